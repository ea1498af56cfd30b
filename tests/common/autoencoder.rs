//! Small autoencoders with random weights, under the names of their files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::normals::normals;
use edm2k::formats::safetensors::{self, Dtype};

/// Shape and values by name.
pub type File = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Adds a layer with weights that keep magnitudes, and a bias or norm that is not nothing.
fn layer(file: &mut File, name: &str, shape: &[usize], bias: bool) {
    let key = file.len() as u64;
    let fan_in: usize = shape[1..].iter().product();
    let weight = normals(shape.iter().product(), key, 1.0).into_iter();
    let weight = match shape.len() {
        1 => weight.map(|x| 1.0 + 0.3 * x).collect(),
        _ => weight.map(|x| x / (fan_in as f32).sqrt()).collect(),
    };
    file.insert(format!("{name}.weight"), (shape.to_vec(), weight));
    if bias {
        let values = normals(shape[0], key + 1000, 0.3);
        file.insert(format!("{name}.bias"), (vec![shape[0]], values));
    }
}

fn resnet(file: &mut File, name: &str, cin: usize, cout: usize) {
    layer(file, &format!("{name}.norm1"), &[cin], true);
    layer(file, &format!("{name}.conv1"), &[cout, cin, 3, 3], true);
    layer(file, &format!("{name}.norm2"), &[cout], true);
    layer(file, &format!("{name}.conv2"), &[cout, cout, 3, 3], true);
    if cin != cout {
        layer(file, &format!("{name}.conv_shortcut"), &[cout, cin, 1, 1], true);
    }
}

pub fn sd_vae(channels: &[usize], layers: usize) -> File {
    let mut file = File::new();
    let f = &mut file;
    let last = channels[channels.len() - 1];
    layer(f, "encoder.conv_in", &[channels[0], 3, 3, 3], true);
    layer(f, "decoder.conv_in", &[last, 4, 3, 3], true);
    for (side, order) in [("encoder.down", channels.to_vec()), ("decoder.up", channels.iter().rev().copied().collect())]
    {
        let (extra, resize) = if side == "decoder.up" { (1, "upsamplers.0.conv") } else { (0, "downsamplers.0.conv") };
        let mut width = order[0];
        for (i, &c) in order.iter().enumerate() {
            let name = format!("{side}_blocks.{i}");
            for j in 0..layers + extra {
                resnet(f, &format!("{name}.resnets.{j}"), width, c);
                width = c;
            }
            if i + 1 < order.len() {
                layer(f, &format!("{name}.{resize}"), &[c, c, 3, 3], true);
            }
        }
    }
    for side in ["encoder", "decoder"] {
        for i in 0..2 {
            resnet(f, &format!("{side}.mid_block.resnets.{i}"), last, last);
        }
        let attention = format!("{side}.mid_block.attentions.0");
        layer(f, &format!("{attention}.group_norm"), &[last], true);
        for part in ["to_q", "to_k", "to_v", "to_out.0"] {
            layer(f, &format!("{attention}.{part}"), &[last, last], true);
        }
    }
    layer(f, "encoder.conv_norm_out", &[last], true);
    layer(f, "encoder.conv_out", &[8, last, 3, 3], true);
    layer(f, "quant_conv", &[8, 8, 1, 1], true);
    layer(f, "post_quant_conv", &[4, 4, 1, 1], true);
    layer(f, "decoder.conv_norm_out", &[channels[0]], true);
    layer(f, "decoder.conv_out", &[3, channels[0], 3, 3], true);
    file
}

pub fn taesd(c: usize) -> File {
    let mut file = File::new();
    let f = &mut file;
    for (side, edge, convs) in [("encoder", [3, 4], [2, 6, 10]), ("decoder", [4, 3], [6, 11, 16])] {
        let last = if side == "encoder" { 14 } else { 18 };
        layer(f, &format!("{side}.layers.0"), &[c, edge[0], 3, 3], true);
        layer(f, &format!("{side}.layers.{last}"), &[edge[1], c, 3, 3], true);
        for i in 1..last {
            let name = format!("{side}.layers.{i}");
            if convs.contains(&i) {
                layer(f, &name, &[c, c, 3, 3], false);
            } else if side == "encoder" || ![1, 5, 10, 15].contains(&i) {
                for j in [0, 2, 4] {
                    layer(f, &format!("{name}.conv.{j}"), &[c, c, 3, 3], true);
                }
            }
        }
    }
    file
}

pub fn write(path: &Path, file: &File) {
    let bytes: Vec<Vec<u8>> = file.values().map(|(_, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let tensors: Vec<safetensors::TensorOut> = file
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), bytes)| (name.as_str(), Dtype::F32, shape.as_slice(), bytes.as_slice()))
        .collect();
    safetensors::write(path, &tensors, &HashMap::new()).unwrap();
}
