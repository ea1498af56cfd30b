//! The codecs: single convolutions, whole autoencoders and EDM2's conventions against a naive reference in f64 that
//! is written here from the definitions, and against the reference library's numbers; bad files; the command line.

use std::path::{Path, PathBuf};

use crate::common::autoencoder::{File, sd_vae, taesd, write};
use crate::common::close::assert_close;
use crate::common::command::edm2k;
use crate::common::normals::normals;
use edm2k::backend::Backend;
use edm2k::backend::codec::{CodecBackend, Epilogue, Prologue, Reach};
use edm2k::backend::cpu::Cpu;
use edm2k::codec::{CodecFile, TAESD_SCALE};
use edm2k::formats::safetensors::SafeFile;
use edm2k::model::Config;
use edm2k::model::file::{ImageSpace, Model, Stored};
use edm2k::pictures::{Picture, png::read_text};
use serde_json::json;

// ---- a naive autoencoder: [C, H, W] in f64, every sum written out -------------------------------------------

#[derive(Clone, Debug)]
struct Image {
    c: usize,
    h: usize,
    w: usize,
    v: Vec<f64>,
}

impl Image {
    fn of(c: usize, h: usize, w: usize, f: impl Fn(usize, usize, usize) -> f64) -> Self {
        let at = |i: usize| f(i / (h * w), i / w % h, i % w);
        Self { c, h, w, v: (0..c * h * w).map(at).collect() }
    }

    /// Zero outside.
    fn at(&self, c: usize, y: isize, x: isize) -> f64 {
        let inside = y >= 0 && x >= 0 && (y as usize) < self.h && (x as usize) < self.w;
        if inside { self.v[(c * self.h + y as usize) * self.w + x as usize] } else { 0.0 }
    }

    fn from_nhwc(c: usize, h: usize, w: usize, v: &[f32]) -> Self {
        assert_eq!(v.len(), c * h * w);
        Self::of(c, h, w, |c_, y, x| v[(y * w + x) * c + c_].into())
    }

    fn nhwc(&self) -> Vec<f32> {
        let Self { c, w, .. } = *self;
        (0..self.v.len()).map(|i| self.at(i % c, (i / c / w) as isize, (i / c % w) as isize) as f32).collect()
    }

    fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { v: self.v.iter().map(|&x| f(x)).collect(), ..self.clone() }
    }

    fn plus(&self, other: &Self) -> Self {
        assert_eq!((self.c, self.h, self.w), (other.c, other.h, other.w));
        Self { v: self.v.iter().zip(&other.v).map(|(a, b)| a + b).collect(), ..self.clone() }
    }

    fn silu(&self) -> Self {
        self.map(|x| x / (1.0 + (-x).exp()))
    }

    fn relu(&self) -> Self {
        self.map(|x| x.max(0.0))
    }

    fn twice(&self) -> Self {
        Self::of(self.c, self.h * 2, self.w * 2, |c, y, x| self.at(c, y as isize / 2, x as isize / 2))
    }

    /// PyTorch's conv2d of an image padded by `before` above and left, and as much below and right as is needed.
    fn conv(&self, weight: &[f32], bias: Option<&[f32]>, side: usize, stride: usize, before: usize) -> Self {
        let cout = weight.len() / (self.c * side * side);
        Self::of(cout, self.h / stride, self.w / stride, |co, y, x| {
            let mut sum = bias.map_or(0.0, |bias| f64::from(bias[co]));
            for ci in 0..self.c {
                for (dy, dx) in (0..side * side).map(|t| (t / side, t % side)) {
                    let at = |i: usize, d: usize| (i * stride + d) as isize - before as isize;
                    sum += f64::from(weight[((co * self.c + ci) * side + dy) * side + dx])
                        * self.at(ci, at(y, dy), at(x, dx));
                }
            }
            sum
        })
    }
}

struct Naive<'a>(&'a File);

impl Naive<'_> {
    fn get(&self, name: &str) -> &[f32] {
        &self.0.get(name).unwrap_or_else(|| panic!("no {name}")).1
    }

    fn conv(&self, name: &str, x: &Image, stride: usize, before: usize) -> Image {
        let (shape, weight) = &self.0[&format!("{name}.weight")];
        let bias = self.0.get(&format!("{name}.bias")).map(|(_, v)| &v[..]);
        x.conv(weight, bias, shape.get(2).copied().unwrap_or(1), stride, before)
    }

    fn same(&self, name: &str, x: &Image) -> Image {
        self.conv(name, x, 1, 1)
    }

    fn point(&self, name: &str, x: &Image) -> Image {
        self.conv(name, x, 1, 0)
    }

    fn norm(&self, name: &str, x: &Image) -> Image {
        let (weight, bias) = (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        let (per, area) = (x.c / 32, x.h * x.w);
        let mut out = x.clone();
        for group in 0..32 {
            let values = &mut out.v[group * per * area..][..per * area];
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
            for (i, v) in values.iter_mut().enumerate() {
                let c = group * per + i / area;
                *v = (*v - mean) / (variance + 1e-6).sqrt() * f64::from(weight[c]) + f64::from(bias[c]);
            }
        }
        out
    }

    fn resnet(&self, name: &str, x: &Image) -> Image {
        let h = self.same(&format!("{name}.conv1"), &self.norm(&format!("{name}.norm1"), x).silu());
        let h = self.same(&format!("{name}.conv2"), &self.norm(&format!("{name}.norm2"), &h).silu());
        let shortcut = format!("{name}.conv_shortcut");
        match self.0.contains_key(&format!("{shortcut}.weight")) {
            true => h.plus(&self.point(&shortcut, x)),
            false => h.plus(x),
        }
    }

    fn middle(&self, side: &str, x: &Image) -> Image {
        let x = self.resnet(&format!("{side}.mid_block.resnets.0"), x);
        let name = format!("{side}.mid_block.attentions.0");
        let normed = self.norm(&format!("{name}.group_norm"), &x);
        let [q, k, v] = ["to_q", "to_k", "to_v"].map(|part| self.point(&format!("{name}.{part}"), &normed));
        let area = x.h * x.w;
        let mut y = x.clone();
        for i in 0..area {
            let dot = |j: usize| (0..x.c).map(|c| q.v[c * area + i] * k.v[c * area + j]).sum::<f64>();
            let weights: Vec<f64> = (0..area).map(|j| (dot(j) / (x.c as f64).sqrt()).exp()).collect();
            let total: f64 = weights.iter().sum();
            for c in 0..x.c {
                y.v[c * area + i] = (0..area).map(|j| weights[j] * v.v[c * area + j]).sum::<f64>() / total;
            }
        }
        let x = x.plus(&self.point(&format!("{name}.to_out.0"), &y));
        self.resnet(&format!("{side}.mid_block.resnets.1"), &x)
    }

    fn level(&self, name: &str, resnets: usize, mut x: Image) -> Image {
        for j in 0..resnets {
            x = self.resnet(&format!("{name}.resnets.{j}"), &x);
        }
        x
    }

    /// Moments of an image, 8 channels.
    fn sd_encode(&self, levels: usize, layers: usize, image: &Image) -> Image {
        let mut x = self.same("encoder.conv_in", image);
        for i in 0..levels {
            let name = format!("encoder.down_blocks.{i}");
            x = self.level(&name, layers, x);
            if i + 1 < levels {
                x = self.conv(&format!("{name}.downsamplers.0.conv"), &x, 2, 0);
            }
        }
        let x = self.middle("encoder", &x);
        let x = self.same("encoder.conv_out", &self.norm("encoder.conv_norm_out", &x).silu());
        self.point("quant_conv", &x)
    }

    fn sd_decode(&self, levels: usize, layers: usize, z: &Image) -> Image {
        let x = self.same("decoder.conv_in", &self.point("post_quant_conv", z));
        let mut x = self.middle("decoder", &x);
        for i in 0..levels {
            let name = format!("decoder.up_blocks.{i}");
            x = self.level(&name, layers + 1, x);
            if i + 1 < levels {
                x = self.same(&format!("{name}.upsamplers.0.conv"), &x.twice());
            }
        }
        self.same("decoder.conv_out", &self.norm("decoder.conv_norm_out", &x).silu())
    }

    fn tiny_block(&self, name: &str, x: &Image) -> Image {
        let h = self.same(&format!("{name}.conv.0"), x).relu();
        let h = self.same(&format!("{name}.conv.2"), &h).relu();
        self.same(&format!("{name}.conv.4"), &h).plus(x).relu()
    }

    fn tiny_encode(&self, image: &Image) -> Image {
        let mut x = self.same("encoder.layers.0", &image.map(|v| (v + 1.0) / 2.0));
        for i in 1..14 {
            let name = format!("encoder.layers.{i}");
            x = if [2, 6, 10].contains(&i) { self.conv(&name, &x, 2, 1) } else { self.tiny_block(&name, &x) };
        }
        self.same("encoder.layers.14", &x)
    }

    fn tiny_decode(&self, z: &Image) -> Image {
        let mut x = self.same("decoder.layers.0", &z.map(|v| (v / 3.0).tanh() * 3.0)).relu();
        for i in 2..18 {
            let name = format!("decoder.layers.{i}");
            x = match i {
                5 | 10 | 15 => x.twice(),
                6 | 11 | 16 => self.same(&name, &x),
                _ => self.tiny_block(&name, &x),
            };
        }
        self.same("decoder.layers.18", &x).map(|v| 2.0 * v - 1.0)
    }
}

// ---- random files -------------------------------------------------------------------------------------------

/// Both sides compute in f64; what differs is the rounding of results to f32: 3e-8, twice where they are scaled.
const EXACT: f64 = 1e-7;
/// Some thirty layers in f32, as `verify` allows.
const F32: f64 = 1e-5;

// ---- the operations -----------------------------------------------------------------------------------------

#[test]
fn convolutions_of_every_reach_match_their_definition() {
    // Few pixels (one band) and many (several bands, whose edges see each other), odd where that is allowed.
    for (n, h, w) in [(3, 4, 6), (2, 38, 54), (1, 1, 1), (2, 7, 5), (1, 61, 47)] {
        for reach in [Reach::Point, Reach::Same, Reach::Double, Reach::Down, Reach::Halve] {
            let halves = matches!(reach, Reach::Down | Reach::Halve);
            if halves && (h % 2 == 1 || w % 2 == 1) {
                continue;
            }
            let (cin, cout, side) = (3, 5, reach.side());
            let weight = normals(cout * cin * side * side, 1, 1.0);
            let bias = normals(cout, 2, 1.0);
            let x = normals(n * h * w * cin, 3, 1.0);
            let mut b = Cpu::<f64, ()>::for_codec();
            let conv = b.load_conv(reach, cin, &weight, Some(&bias));
            let t = b.upload([n, h, w, cin], &x);
            let got = b.convolve(&conv, &t, Prologue::Nothing, Epilogue::NOTHING);
            let got = b.download(&got).unwrap();
            let want = x.chunks(h * w * cin).flat_map(|x| {
                let x = Image::from_nhwc(cin, h, w, x);
                let (x, stride, before) = match reach {
                    Reach::Point => (x, 1, 0),
                    Reach::Same => (x, 1, 1),
                    Reach::Double => (x.twice(), 1, 1),
                    Reach::Down => (x, 2, 0),
                    Reach::Halve => (x, 2, 1),
                };
                x.conv(&weight, Some(&bias), side, stride, before).nhwc()
            });
            assert_close(&format!("{reach:?} of {n} {w}x{h}"), &got, &want.collect::<Vec<_>>(), EXACT);
        }
    }
}

#[test]
fn a_large_mean_does_not_spoil_the_group_norm() {
    // Mean 1000, deviation 1: the difference of squares would lose all digits in f32.
    let (h, w, c) = (40, 24, 64);
    let x: Vec<f32> = normals(h * w * c, 5, 1.0).iter().map(|x| 1000.0 + x).collect();
    let mut b = Cpu::<f32, ()>::for_codec();
    let t = b.upload([1, h, w, c], &x);
    let one = b.upload([1, 1, 2, c], &[vec![1.0; c], vec![0.0; c]].concat());
    let affine = b.group_norm(&t, &one, 32, 1e-6);
    let got = b.download(&affine).unwrap();
    for group in 0..32 {
        let values: Vec<f64> = x.chunks(c).flat_map(|p| [p[group * 2], p[group * 2 + 1]]).map(f64::from).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        let want = 1.0 / (variance + 1e-6).sqrt();
        // The mean of a row is rounded by up to 1e-4 here; times the spread of such means, 0.2, that is 2e-5 at worst.
        assert!((f64::from(got[group * 2]) / want - 1.0).abs() < 2e-5, "group {group}: {} {want}", got[group * 2]);
    }
}

// ---- whole networks -----------------------------------------------------------------------------------------

fn check_sd_vae(channels: &[usize], layers: usize, [h, w]: [usize; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vae.safetensors");
    let file = sd_vae(channels, layers);
    write(&path, &file);
    let codec = CodecFile::open(&path).unwrap();
    let factor = 1 << (channels.len() - 1);
    assert_eq!(codec.factor(), factor);
    let what = format!("{channels:?} at {w}x{h}");
    let naive = Naive(&file);
    let z = normals(h * w * 4, 11, 1.0);
    let want = naive.sd_decode(channels.len(), layers, &Image::from_nhwc(4, h, w, &z)).nhwc();
    let (ih, iw) = (h * factor, w * factor);
    let pixels: Vec<f32> = normals(ih * iw * 3, 12, 1.0).iter().map(|x| (0.5 + 0.2 * x).clamp(0.0, 1.0)).collect();
    let moments = naive.sd_encode(channels.len(), layers, &Image::from_nhwc(3, ih, iw, &pixels)).nhwc();
    let half = |from: usize| moments.chunks(8).flat_map(|p| p[from..from + 4].to_vec()).collect::<Vec<_>>();

    let b = &mut Cpu::<f64, ()>::for_codec();
    let got = codec.decoder(b).unwrap().image(b, [h, w], &z).unwrap();
    assert_close(&format!("{what}: decoded"), &got, &want, EXACT);
    let got = codec.encoder(b).unwrap().moments(b, [ih, iw], &pixels).unwrap().0;
    assert_close(&format!("{what}: mean"), &got.mean, &half(0), EXACT);
    assert_close(&format!("{what}: logvar"), &got.logvar, &half(4), EXACT);

    let b = &mut Cpu::<f32, ()>::for_codec();
    let got = codec.decoder(b).unwrap().image(b, [h, w], &z).unwrap();
    assert_close(&format!("{what}: decoded in f32"), &got, &want, F32);
    let got = codec.encoder(b).unwrap().moments(b, [ih, iw], &pixels).unwrap().0;
    assert_close(&format!("{what}: mean in f32"), &got.mean, &half(0), F32);
}

#[test]
fn an_sd_vae_of_any_levels_widths_and_sizes_matches_its_definition() {
    check_sd_vae(&[32], 1, [3, 5]);
    check_sd_vae(&[32, 64], 1, [35, 23]); // several bands in both directions, more than 256 tokens
    check_sd_vae(&[64, 32, 64], 2, [3, 2]);
}

#[test]
fn a_taesd_matches_its_definition() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("taesd.safetensors");
    let file = taesd(8);
    write(&path, &file);
    let codec = CodecFile::open(&path).unwrap();
    let (h, w) = (5, 7);
    let z = normals(h * w * 4, 11, 1.0);
    let scaled = Image::from_nhwc(4, h, w, &z).map(|x| x * f64::from(TAESD_SCALE));
    let want = Naive(&file).tiny_decode(&scaled).nhwc();
    let pixels: Vec<f32> = normals(64 * h * w * 3, 12, 1.0).iter().map(|x| (0.5 + 0.2 * x).clamp(0.0, 1.0)).collect();
    let latents = Naive(&file).tiny_encode(&Image::from_nhwc(3, 8 * h, 8 * w, &pixels));
    let latents = latents.map(|x| x / f64::from(TAESD_SCALE)).nhwc();

    let b = &mut Cpu::<f64, ()>::for_codec();
    let decoded = codec.decoder(b).unwrap().image(b, [h, w], &z).unwrap();
    // The latent is scaled in f32.
    assert_close("decoded", &decoded, &want, 2.0 * EXACT);
    let moments = codec.encoder(b).unwrap().moments(b, [8 * h, 8 * w], &pixels).unwrap().0;
    assert_close("latents", &moments.mean, &latents, EXACT);
    assert!(moments.std().iter().all(|&x| x == 0.0), "TAESD's latents are certain");

    // The author's files hold one half each, and count the decoder's soft clip as a layer.
    let decoder: File = file
        .iter()
        .filter_map(|(name, tensor)| {
            let (number, rest) = name.strip_prefix("decoder.layers.")?.split_once('.')?;
            Some((format!("{}.{rest}", number.parse::<usize>().unwrap() + 1), tensor.clone()))
        })
        .collect();
    write(&dir.path().join("decoder.safetensors"), &decoder);
    let alone = CodecFile::open(dir.path().join("decoder.safetensors")).unwrap();
    assert_eq!(alone.decoder(b).unwrap().image(b, [h, w], &z).unwrap(), decoded);
    let error = alone.encoder(b).err().unwrap().to_string();
    assert!(error.contains("decoder.safetensors: this TAESD file holds the decoder only"), "{error}");
    let encoder: File = file
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("encoder.layers.")?.to_owned(), tensor.clone())))
        .collect();
    write(&dir.path().join("encoder.safetensors"), &encoder);
    let alone = CodecFile::open(dir.path().join("encoder.safetensors")).unwrap();
    assert_eq!(alone.encoder(b).unwrap().moments(b, [8 * h, 8 * w], &pixels).unwrap().0, moments);
    assert!(alone.decoder(b).is_err());
}

/// The new names of the attention, and the old ones, in which linear layers may be 1x1 convolutions.
fn old_names(file: &File) -> File {
    let names = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    let renamed = file.iter().map(|(name, (shape, values))| {
        let new = names.iter().fold(name.clone(), |name, (new, old)| name.replace(new, old));
        let linear = new != *name && shape.len() == 2 && name.starts_with("encoder");
        let shape = if linear { [&shape[..], &[1, 1]].concat() } else { shape.clone() };
        (new, (shape, values.clone()))
    });
    renamed.collect()
}

#[test]
fn both_namings_of_the_attention_are_the_same_network() {
    let dir = tempfile::tempdir().unwrap();
    let [new, old] = ["new", "old"].map(|name| dir.path().join(name));
    let file = sd_vae(&[32, 64], 1);
    write(&new, &file);
    write(&old, &old_names(&file));
    assert!(SafeFile::open(&old).unwrap().contains("decoder.mid_block.attentions.0.proj_attn.bias"));
    let b = &mut Cpu::<f32, ()>::for_codec();
    let pixels = vec![0.25; 8 * 6 * 3];
    let z = normals(4 * 3 * 4, 1, 1.0);
    let [new, old] = [new, old].map(|path| {
        let codec = CodecFile::open(path).unwrap();
        let image = codec.decoder(b).unwrap().image(b, [4, 3], &z).unwrap();
        (image, codec.encoder(b).unwrap().moments(b, [8, 6], &pixels).unwrap())
    });
    assert_eq!(new, old);
}

/// NHWC values of the images of a golden tensor, one after the other, with their height and width.
fn golden(file: &SafeFile, name: &str) -> ([usize; 2], Vec<Vec<f32>>) {
    let &[_, c, h, w] = file.shape(name).unwrap() else { panic!("{name}") };
    let values = file.f32(name).unwrap();
    let nhwc = |v: &[f32]| (0..v.len()).map(|i| v[i % c * h * w + i / c]).collect();
    ([h, w], values.chunks(c * h * w).map(nhwc).collect())
}

#[test]
fn the_reference_librarys_numbers_are_reproduced() {
    let Some(dir) = std::env::var_os("EDM2K_GOLDEN").map(PathBuf::from) else {
        return eprintln!("EDM2K_GOLDEN is not set");
    };
    let b = &mut Cpu::<f64, ()>::for_codec();
    for (stem, scale) in [("vae", 1.0), ("taesd", TAESD_SCALE)] {
        let file = SafeFile::open(dir.join(format!("{stem}.safetensors"))).unwrap();
        let codec = CodecFile::open(dir.join(format!("{stem}_model.safetensors"))).unwrap();
        let decoder = codec.decoder(b).unwrap();
        let (size, latents) = golden(&file, "z");
        for (z, want) in latents.iter().zip(golden(&file, "decoded").1) {
            let raw: Vec<f32> = z.iter().map(|x| x / scale).collect();
            assert_close(&format!("{stem}: decoded"), &decoder.image(b, size, &raw).unwrap(), &want, 2.0 * EXACT);
        }
        let encoder = codec.encoder(b).unwrap();
        let (size, images) = golden(&file, "image");
        for (i, image) in images.iter().enumerate() {
            let moments = encoder.moments(b, size, image).unwrap().0;
            if stem == "vae" {
                assert_close("mean", &moments.mean, &golden(&file, "mean").1[i], EXACT);
                assert_close("logvar", &moments.logvar, &golden(&file, "logvar").1[i], EXACT);
                assert_close("std", &moments.std(), &golden(&file, "std").1[i], EXACT);
            } else {
                let latents: Vec<f32> = moments.mean.iter().map(|x| x * scale).collect();
                assert_close("latents", &latents, &golden(&file, "latents").1[i], 2.0 * EXACT);
            }
        }
    }
}

// ---- EDM2's conventions -------------------------------------------------------------------------------------

#[test]
fn pictures_and_latents_follow_edm2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vae.safetensors");
    let mut file = sd_vae(&[32, 32], 1);
    // Channels 4 to 7 of the moments: clamped below, above, and two within.
    file.get_mut("quant_conv.bias").unwrap().1[4..6].copy_from_slice(&[-1000.0, 1000.0]);
    // Images that reach beyond [0, 1].
    file.get_mut("decoder.conv_out.weight").unwrap().1.iter_mut().for_each(|x| *x *= 2.0);
    write(&path, &file);
    let codec = CodecFile::open(&path).unwrap();
    let b = &mut Cpu::<f32, ()>::for_codec();
    let (encoder, decoder) = (codec.encoder(b).unwrap(), codec.decoder(b).unwrap());

    let rgb: Vec<u8> = (0..8 * 6 * 3).map(|i| (i * 37 % 256) as u8).collect();
    let moments = encoder.encode(b, &Picture::new(8, 6, rgb.clone())).unwrap();
    let pixels: Vec<f32> = rgb.iter().map(|&x| f32::from(x) / 255.0).collect();
    assert_eq!(moments, encoder.moments(b, [8, 6], &pixels).unwrap().0);
    let std = moments.std();
    assert!(std.iter().step_by(4).all(|&x| x == (-15f32).exp()), "the smallest logvar is -30");
    assert!(std.iter().skip(1).step_by(4).all(|&x| x == 10f32.exp()), "the largest is 20");

    let (means, stds) = ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]);
    let noise = normals(moments.mean.len(), 3, 1.0);
    let [mean, deviation] = moments.scaled();
    for i in 0..noise.len() {
        let raw = f64::from(moments.mean[i]) + f64::from(std[i]) * f64::from(noise[i]);
        let want = (raw - means[i % 4]) * 0.5 / stds[i % 4];
        let latent = f64::from(mean[i]) + f64::from(deviation[i]) * f64::from(noise[i]);
        assert!((latent - want).abs() <= 1e-6 * want.abs().max(1.0), "{i}: {latent} {want}");
    }

    let latent = normals(5 * 4 * 4, 4, 1.0);
    let picture = decoder.decode(b, [5, 4], &latent).unwrap();
    assert_eq!((picture.height(), picture.width()), (10, 8));
    let raw: Vec<f32> =
        latent.iter().enumerate().map(|(i, x)| (f64::from(*x) * stds[i % 4] / 0.5 + means[i % 4]) as f32).collect();
    let image = decoder.image(b, [5, 4], &raw).unwrap();
    let mut clamped = (0, 0);
    for (&got, &value) in picture.rgb().iter().zip(&image) {
        clamped = (clamped.0 + usize::from(value < 0.0), clamped.1 + usize::from(value > 1.0));
        let exact = value.clamp(0.0, 1.0) * 255.0;
        // Truncated: a value that rounding moves over an integer may fall either way.
        assert!(f32::from(got) <= exact + 0.01 && f32::from(got) > exact - 1.01, "{got} of {value}");
    }
    assert!(clamped.0 > 5 && clamped.1 > 5, "{clamped:?}");

    let error = encoder.encode(b, &Picture::new(3, 6, vec![0; 54])).unwrap_err();
    assert_eq!(error.to_string(), "an image of 6x3, expected multiples of 2");
}

// ---- bad files ----------------------------------------------------------------------------------------------

#[test]
fn damaged_files_are_refused_by_file_and_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.safetensors");
    let refuse = |file: &File, what: &[&str]| {
        write(&path, file);
        let b = &mut Cpu::<f32, ()>::for_codec();
        let opened = CodecFile::open(&path).and_then(|codec| codec.decoder(b).map(|_| ()));
        let error = opened.unwrap_err().to_string();
        for what in ["bad.safetensors: "].iter().chain(what) {
            assert!(error.contains(what) && error.lines().count() == 1, "{error}: no {what}");
        }
    };
    let good = sd_vae(&[32, 64], 1);
    for name in good.keys() {
        let mut file = good.clone();
        file.remove(name);
        write(&path, &file);
        let error = CodecFile::open(&path).unwrap_err().to_string();
        // Without its first resnet a level is none, and what follows does not fit.
        assert!(error.contains("bad.safetensors: tensor "), "{name}: {error}");
    }
    let many = (0..65).map(|level| {
        (format!("encoder.down_blocks.{level}.resnets.0.conv1.weight"), (vec![32, 1, 3, 3], vec![0.0; 288]))
    });
    refuse(&good.clone().into_iter().chain(many).collect(), &["found a level, expected 8 levels at most"]);
    let changed = |change: &dyn Fn(&mut File)| {
        let mut file = good.clone();
        change(&mut file);
        file
    };
    let name = "decoder.up_blocks.1.resnets.0.conv_shortcut.weight";
    refuse(&changed(&|f| drop(f.remove(name))), &[name, "is missing"]);
    refuse(
        &changed(&|f| f.get_mut(name).unwrap().0 = vec![64, 32, 1, 1]),
        &[name, "found shape [64, 32, 1, 1]", "expected [32, 64, 1, 1]"],
    );
    refuse(&changed(&|f| f.get_mut(name).unwrap().1[5] = f32::NAN), &[name, "found NaN at 5", "finite"]);
    refuse(
        &changed(&|f| drop(f.insert("encoder.mid_block.extra".into(), (vec![1], vec![0.0])))),
        &["encoder.mid_block.extra is not part of an SD-VAE of block_out_channels [32, 64]"],
    );
    let name = "encoder.down_blocks.1.resnets.0.conv1.weight";
    refuse(&changed(&|f| f.get_mut(name).unwrap().0 = vec![48, 32, 4, 3]), &[name, "found shape [48, 32, 4, 3]"]);
    let name = "decoder.mid_block.attentions.0.to_k.weight";
    refuse(&changed(&|f| drop(f.remove(name))), &[name, "is missing"]);

    let good = taesd(8);
    let name = "decoder.layers.6.bias";
    let mut file = good.clone();
    file.insert(name.into(), (vec![8], vec![0.0; 8]));
    refuse(&file, &[name, "is not part of a TAESD of 8 channels"]);
    let name = "decoder.layers.14.conv.2.weight";
    let mut file = good.clone();
    file.remove(name);
    refuse(&file, &[name, "is missing"]);
    let other = File::from([("x".to_owned(), (vec![1], vec![0.0]))]);
    refuse(&other, &["neither an SD-VAE nor a TAESD"]);
}

// ---- the command line ---------------------------------------------------------------------------------------

fn tiny_model(path: &Path, channels: usize, encoder: ImageSpace) {
    let config = json!({
        "img_resolution": 8, "img_channels": channels, "label_dim": 0, "model_channels": 16, "channel_mult": [1, 1],
        "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 16,
    });
    let config: Config = serde_json::from_value(config).unwrap();
    let mut model = Model::init(&config, 3).unwrap();
    model.meta.encoder = encoder;
    (model.meta.height, model.meta.width) = (6, 4);
    model.save(path, Stored::F32).unwrap();
}

fn sample(dir: &Path, model: &str, more: &[&str]) -> assert_cmd::assert::Assert {
    let arguments = ["sample", "--steps", "2", "--seeds", "0-1", "--overwrite", "--model", model];
    edm2k(dir, &arguments).args(more).assert()
}

fn size(path: &Path) -> (u32, u32) {
    let info = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    info.info().size()
}

/// On the emulator: what exceeds f16 is an error that says what to do, and bf16 holds it.
#[cfg(feature = "emulator")]
#[test]
fn an_overflow_of_f16_is_reported() {
    use edm2k::backend::gpu::emulated::{Build, Emulated, Emulator};
    use edm2k::backend::gpu::engine::Gpu;
    use edm2k::backend::gpu::launch;
    let dir = tempfile::tempdir().unwrap();
    let mut large = sd_vae(&[32, 32], 1);
    large.get_mut("decoder.conv_in.bias").unwrap().1.iter_mut().for_each(|x| *x += 1e5);
    write(&dir.path().join("vae"), &large);
    let file = CodecFile::open(dir.path().join("vae")).unwrap();
    let decode = |precision| {
        let runtime = Emulated::new(Emulator::new(Build::Checked).unwrap(), u64::MAX);
        let mut gpu = Gpu::for_codec(std::rc::Rc::new(runtime), precision).unwrap();
        file.decoder(&mut gpu).unwrap().decode(&mut gpu, [2, 2], &[0.5; 16])
    };
    let error = decode(launch::Precision::F16).unwrap_err().to_string();
    assert!(error.contains("no finite numbers") && error.contains("--precision bf16"), "{error}");
    decode(launch::Precision::Bf16).unwrap();
}

#[test]
fn sample_decodes_latents_to_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    tiny_model(&at("latent"), 4, ImageSpace::SdVae);
    tiny_model(&at("rgb"), 3, ImageSpace::Rgb);
    write(&at("vae"), &sd_vae(&[32, 32, 32, 32], 1));
    write(&at("tiny"), &taesd(8));
    for vae in ["vae", "tiny"] {
        let out = format!("of-{vae}");
        sample(dir.path(), "latent", &["--outdir", &out, "--vae", vae, "--save-steps"]).success();
        assert_eq!(size(&at(&out).join("000001.png")), (32, 48));
        assert_eq!(size(&at(&out).join("000001-steps.png")), (2 * 32 + 6, 48 + 4));
        let text = read_text(&at(&out).join("grid.png")).unwrap();
        assert!(text.iter().any(|(_, text)| text.contains(&format!("\"vae\":\"{vae}\""))), "{text:?}");
        assert!(!at(&out).join("latents.safetensors").exists());
    }
    let out = sample(dir.path(), "latent", &["--outdir", "plain", "--precision", "f32"]).success();
    let out = String::from_utf8_lossy(&out.get_output().stdout).into_owned();
    assert!(out.contains("--vae FILE") && at("plain/latents.safetensors").exists(), "{out}");

    // The picture is that of the latents.
    let latents = SafeFile::open(at("plain/latents.safetensors")).unwrap();
    let (size, latents) = golden(&latents, "latents");
    let b = &mut Cpu::<f32, ()>::for_codec();
    let decoder = CodecFile::open(at("vae")).unwrap().decoder(b).unwrap();
    let want = decoder.decode(b, size, &latents[1]).unwrap();
    sample(dir.path(), "latent", &["--outdir", "exact", "--vae", "vae", "--precision", "f32"]).success();
    let got = image::open(at("exact/000001.png")).unwrap().to_rgb8();
    assert_eq!(got.as_raw(), want.rgb());

    // The kernels make the same picture: within 40 dB, as for the sampler.
    #[cfg(feature = "emulator")]
    {
        let options = ["--outdir", "emulated", "--vae", "vae", "--device", "emulated"];
        sample(dir.path(), "latent", &options).success();
        let got = image::open(at("emulated/000001.png")).unwrap().to_rgb8();
        let squares = got.as_raw().iter().zip(want.rgb()).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
        let mean = squares.sum::<f64>() / want.rgb().len() as f64;
        assert!(mean < 255.0f64.powi(2) * 1e-4, "mean square error {mean}");
    }

    let fails = |model: &str, vae: &str, what: &str| {
        let out = sample(dir.path(), model, &["--outdir", "none", "--vae", vae]).code(1);
        let error = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(error.contains(what) && error.lines().count() == 1, "{error}");
        assert!(!at("none").exists(), "nothing is made before the autoencoder is known to be good");
    };
    fails("rgb", "vae", "--vae: rgb makes no latents");
    fails("latent", "rgb", "--vae: rgb: neither an SD-VAE nor a TAESD");
    fails("latent", "absent", "--vae: absent: No such file");
}

#[test]
fn latents_are_decoded_by_what_made_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let vae = sd_vae(&[32, 32, 32, 32], 1);
    write(&at("vae"), &vae);
    // The same encoder: in half precision, under old names, and with a decoder that was trained further.
    let halves = vae.iter().map(|(name, (shape, values))| {
        (name.clone(), (shape.clone(), values.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect()))
    });
    write(&at("half"), &halves.collect());
    write(&at("old"), &old_names(&vae));
    let change = |name: &str| {
        let mut changed = vae.clone();
        changed.get_mut(name).unwrap().1[0] += 1.0;
        changed
    };
    write(&at("decoder"), &change("decoder.conv_in.bias"));
    write(&at("encoder"), &change("encoder.conv_in.bias"));
    write(&at("tiny"), &taesd(8));
    let made_by = CodecFile::open(at("vae")).unwrap().autoencoder().unwrap();
    tiny_model(&at("latent"), 4, ImageSpace::SdVae);
    let mut model = Model::load(at("latent")).unwrap();
    model.meta.autoencoder = made_by;
    model.save(at("latent"), Stored::F32).unwrap();
    let said = |vae: &str, code: i32| {
        let out = sample(dir.path(), "latent", &["--outdir", "o", "--vae", vae]).code(code);
        String::from_utf8_lossy(&out.get_output().stderr).into_owned()
    };
    for same in ["vae", "half", "old", "decoder"] {
        assert!(!said(same, 0).contains("warning"), "{same}");
    }
    let text = said("encoder", 1);
    let expected = "--vae: encoder: it is the SD-VAE encoder (";
    assert!(text.contains(expected) && text.contains("but the latents of latent are of the SD-VAE vae ("), "{text}");
    let text = said("tiny", 0);
    assert!(text.contains("warning: --vae tiny (the TAESD) only approximates the SD-VAE vae ("), "{text}");
}
