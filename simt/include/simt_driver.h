// For a program that runs kernels by name: `simt-check kernels.cu --run driver.cpp`.
#pragma once
#include <string>
#include <typeinfo>
#include <vector>

#include <cxxabi.h>

#include "cuda_runtime.h"

extern "C" {
void* emu_function(const char* name, const char* types);
const char* emu_last_error();
}

namespace simt {

// Values in device memory; nobody has written those that no `values` were given for.
template <class T>
class Array {
    T* at;
    size_t count;

public:
    explicit Array(size_t count) : count(count) { cudaMalloc(&at, count * sizeof(T)); }
    explicit Array(const std::vector<T>& values) : Array(values.size()) { memcpy(at, values.data(), count * sizeof(T)); }
    Array(const Array&) = delete;
    ~Array() { cudaFree(at); }
    operator T*() const { return at; }
    std::vector<T> values() const { return std::vector<T>(at, at + count); }
};

template <class T> T plain(const T& value) { return value; }
template <class T> T* plain(const Array<T>& array) { return array; }

// Runs kernel `name` ("scale", or "scale<float>" if the file instantiates it), whose parameters have these arguments'
// types. Returns whether it ran to its end; what went wrong is printed.
template <class... A>
bool start(const char* name, dim3 grid, dim3 block, size_t shared, A... arguments) {
    std::string types;
    auto add = [&](const char* mangled) {
        char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
        types += (types.empty() ? "" : ", ") + std::string(text);
        free(text);
    };
    (add(typeid(A).name()), ...);
    auto* kernel = reinterpret_cast<void (*)(A...)>(emu_function(name, types.c_str()));
    if (!kernel) {
        fprintf(stderr, "%s\n", emu_last_error());
        return false;
    }
    cudaGetLastError();
    launch(name, Config(grid, block, shared), [=](A... a) { kernel(a...); }, arguments...);
    return cudaGetLastError() == cudaSuccess;
}
template <class... A>
bool run(const char* name, dim3 grid, dim3 block, size_t shared, const A&... arguments) {
    return start(name, grid, block, shared, plain(arguments)...);
}

}  // namespace simt
