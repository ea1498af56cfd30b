// What comes before and after the U-Net: preconditioning, the loss and its gradients, logvar.
//
//     precond_input    [c_in x, 1, 0 ...],  c_in = 1 / sqrt(sigma_data^2 + sigma^2)        (EDM eq. 7)
//     precond_output   D = c_skip x + c_out gain raw,  c_skip = sigma_data^2 / s2, c_out = sigma sigma_data / sqrt(s2),
//                      s2 = sigma^2 + sigma_data^2
//     loss             of an image: sum of w (D - clean)^2 + logvar over its values,
//                      w = s2 / (sigma sigma_data)^2 / exp(logvar)                          (EDM2 eq. 14, 15)
//                      grad_raw = 2 w (D - clean) c_out gain;  grad_gain = sum of 2 w (D - clean) c_out raw
//                      grad_logvar = sum of 1 - w (D - clean)^2
//     logvar           weight . sqrt(2) cos(ln(sigma)/4 freqs + phases)
//
// Layout: images x, clean, noisy, D are f32 [n, h, w, c], what the U-Net reads and writes is 16 bits with c
// padded to a multiple of 8; a thread has a pixel. Sums are in a fixed order: partial sums of 256 pixels, then a second kernel
// of one block.
//
// Bytes a pixel of 4 channels: input 16 + 16; output 16 + 8 + 16; loss 16 + 16 + 8 + 16.
#include "math.cuh"

struct PrecondInput {
    const float* x;      // [x_pixels, c]: of all images, or of those that are taken in turn
    const float* sigma;  // [n]
    void* out;           // [n, h, w, 8 vectors]
    int pixels;          // n * h * w
    int per_image;       // h * w
    int channels;        // c
    int vectors;         // (c + 1) / 8, rounded up
    float sigma_data;
    int x_pixels;
};

template <class T>
__device__ __forceinline__ void precond_input(const PrecondInput& p) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    const int pixel = thread / p.vectors, vector = thread % p.vectors;
    if (pixel >= p.pixels) return;
    const float sigma = p.sigma[pixel / p.per_image];
    const float c_in = 1.0f / sqrtf(p.sigma_data * p.sigma_data + sigma * sigma);
    const float* x = p.x + size_t(pixel % p.x_pixels) * p.channels;
    float out[8] = {};
    if (p.channels == 4) {
        float four[4];
        read4(x, four);
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = four[j] * c_in;
        out[4] = 1.0f;
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int channel = 8 * vector + j;
            out[j] = channel < p.channels ? x[channel] * c_in : channel == p.channels ? 1.0f : 0.0f;
        }
    }
    write8<T>(p.out, thread, out);
}

// c_skip and c_out.
__device__ __forceinline__ float2 output_scales(float sigma, float data) {
    const float total = sigma * sigma + data * data;
    return make_float2(data * data / total, sigma * data / sqrtf(total));
}

struct PrecondOutput {
    const float* x;      // [x_pixels, c], as above
    const void* raw;     // [n, h, w, 8 vectors]
    const float* sigma;  // [n]
    const float* gain;   // scalar
    float* out;          // [n, h, w, c]
    int pixels, per_image, channels, vectors;
    float sigma_data;
    int x_pixels;
};

template <class T>
__device__ __forceinline__ void precond_output(const PrecondOutput& p) {
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= p.pixels) return;
    const float2 scales = output_scales(p.sigma[pixel / p.per_image], p.sigma_data);
    const float c_skip = scales.x, c_out = scales.y, gain = *p.gain;
    const size_t first = size_t(pixel) * p.channels, x_first = size_t(pixel % p.x_pixels) * p.channels;
    for (int vector = 0; vector < (p.channels + 7) / 8; vector++) {
        float raw[8];
        read8<T>(p.raw, size_t(pixel) * p.vectors + vector, raw);
        if (p.channels == 4) {
            float x[4];
            read4(p.x + x_first, x);
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = c_skip * x[j] + c_out * (gain * raw[j]);
            write4(p.out + first, x);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int channel = 8 * vector + j;
            if (channel < p.channels) p.out[first + channel] = c_skip * p.x[x_first + channel] + c_out * (gain * raw[j]);
        }
    }
}

constexpr int LOSS_PIXELS = 256;  // of a block

struct LossParams {
    const float* clean;   // [n, h, w, c]
    const float* noisy;   // [n, h, w, c]
    const void* raw;      // [n, h, w, 8 vectors]
    const float* sigma;   // [n]
    const float* logvar;  // [n]
    const float* gain;    // scalar
    void* grad_raw;       // shape of raw
    float2* partial;      // [n, chunks]: sums of w (D - clean)^2 and of the gradient of the gain
    float* per_image;     // [n]
    float* grad_logvar;   // [n]
    float* grad_gain;     // scalar, added to
    int images, pixels;   // n and h * w
    int channels, vectors, chunks;
    float sigma_data;
};

template <class T>
__device__ __forceinline__ void loss(const LossParams& p) {
    __shared__ __align__(16) float scratch[2][32];
    const int chunk = blockIdx.x % p.chunks, image = blockIdx.x / p.chunks;
    const int pixel = chunk * LOSS_PIXELS + threadIdx.x;
    float sums[2] = {};
    if (pixel < p.pixels) {
        const float sigma = p.sigma[image], data = p.sigma_data, gain = *p.gain;
        const float2 scales = output_scales(sigma, data);
        const float both = sigma * data;
        const float weight = (sigma * sigma + data * data) / (both * both) / expf(p.logvar[image]);
        const size_t at = size_t(image) * p.pixels + pixel;
        for (int vector = 0; vector < p.vectors; vector++) {
            float raw[8], grad[8] = {};
            read8<T>(p.raw, at * p.vectors + vector, raw);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int channel = 8 * vector + j;
                if (channel >= p.channels) break;
                const size_t i = at * p.channels + channel;
                const float error = scales.x * p.noisy[i] + scales.y * (gain * raw[j]) - p.clean[i];
                const float dout = 2.0f * weight * error * scales.y;
                sums[0] += weight * error * error;
                sums[1] += dout * raw[j];
                grad[j] = dout * gain;
            }
            write8<T>(p.grad_raw, at * p.vectors + vector, grad);
        }
    }
    block_sum(sums, scratch);
    if (threadIdx.x == 0) p.partial[blockIdx.x] = make_float2(sums[0], sums[1]);
}

// For one block. Each thread sums the chunks of its images; then the block sums the gradient of the gain.
extern "C" __global__ void loss_reduce(LossParams p) {
    begin_kernel();
    __shared__ __align__(16) float scratch[1][32];
    const float values = float(p.pixels) * float(p.channels);
    float gain[1] = {};
    for (int image = threadIdx.x; image < p.images; image += blockDim.x) {
        float term = 0;
        for (int chunk = 0; chunk < p.chunks; chunk++) {
            const float2 sums = p.partial[image * p.chunks + chunk];
            term += sums.x, gain[0] += sums.y;
        }
        p.per_image[image] = term + values * p.logvar[image];
        p.grad_logvar[image] = values - term;
    }
    block_sum(gain, scratch);
    if (threadIdx.x == 0) *p.grad_gain += gain[0];
}
KERNEL_EXPORT(loss_reduce);

struct Logvar {
    const float* sigma;   // [n]
    const float* freqs;   // [channels]
    const float* phases;  // [channels]
    const void* weight;   // effective, [1, channels]
    float* features;      // [n, channels]
    float* logvar;        // [n]
    int channels;
    int padding;
};

// One warp works on one noise level.
template <class T>
__device__ __forceinline__ void logvar(const Logvar& p) {
    const float c_noise = logf(p.sigma[blockIdx.x]) / 4.0f;
    float dot = 0;
    for (int k = threadIdx.x; k < p.channels; k += 32) {
        const float feature = fourier_feature(c_noise, p.freqs[k], p.phases[k]);
        p.features[size_t(blockIdx.x) * p.channels + k] = feature;
        dot += feature * to_float(static_cast<const T*>(p.weight)[k]);
    }
    dot = warp_sum(dot);
    if (threadIdx.x == 0) p.logvar[blockIdx.x] = dot;
}

struct LogvarBackward {
    const float* features;     // [n, channels]
    const float* grad;         // [n]
    float* grad_weight;        // [1, channels], added to
    int images, channels;
};

extern "C" __global__ void logvar_backward(LogvarBackward p) {
    begin_kernel();
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= p.channels) return;
    float sum = 0;
    for (int image = 0; image < p.images; image++) sum += p.grad[image] * p.features[size_t(image) * p.channels + k];
    p.grad_weight[k] += sum;
}
KERNEL_EXPORT(logvar_backward);

#define KERNEL(name, Params)                                                                     \
    extern "C" __global__ void name##_f16(Params p) { begin_kernel(); name<__half>(p); }         \
    KERNEL_EXPORT(name##_f16);                                                                   \
    extern "C" __global__ void name##_bf16(Params p) { begin_kernel(); name<__nv_bfloat16>(p); } \
    KERNEL_EXPORT(name##_bf16)
KERNEL(precond_input, PrecondInput);
KERNEL(precond_output, PrecondOutput);
KERNEL(loss, LossParams);
KERNEL(logvar, Logvar);
