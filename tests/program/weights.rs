//! Weights as people have them: what `torch.save` writes, in both of its forms, and `pickle.dump`, autoencoders under their first names, and
//! networks of which only the tensors are known.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::common::autoencoder;
use crate::common::command::{edm2k, here, printed, refused};
use crate::common::zip::zip;
use edm2k::codec::{AutoencoderKind, CodecFile};
use edm2k::formats::safetensors::{self, Dtype, SafeFile};
use edm2k::formats::weights;
use edm2k::model::{Config, Model, ModelFile};

/// Opcodes of protocol 2, as `pickle` writes them.
struct Pickler(Vec<u8>);

impl Pickler {
    fn new() -> Self {
        Self(vec![0x80, 2])
    }

    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn int(&mut self, number: usize) {
        self.0.push(b'J');
        self.0.extend((number as i32).to_le_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.0.extend(format!("c{module}\n{name}\n").bytes());
    }

    fn ints(&mut self, numbers: &[usize]) {
        self.0.push(b'(');
        numbers.iter().for_each(|&number| self.int(number));
        self.0.push(b't');
    }

    /// A tensor whose storage is kept outside, under a key.
    fn tensor(&mut self, key: &str, shape: &[usize]) {
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.0.push(b'(');
        self.stored(key, shape.iter().product());
        self.view(shape);
    }

    fn stored(&mut self, key: &str, numel: usize) {
        self.0.push(b'(');
        self.text("storage");
        self.global("torch", "FloatStorage");
        self.text(key);
        self.text("cpu");
        self.int(numel);
        self.0.extend(b"tQ");
    }

    /// A name, and a tensor with its storage.
    fn alone(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.text(name);
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.0.push(b'(');
        self.global("torch.storage", "_load_from_bytes");
        let alone = storage(values);
        if self.0[1] == 2 {
            self.global("_codecs", "encode");
            self.text(&alone.iter().map(|&byte| char::from(byte)).collect::<String>());
            self.text("latin1");
            self.0.extend(b"\x86R");
        } else {
            self.0.push(b'B');
            self.0.extend((alone.len() as u32).to_le_bytes());
            self.0.extend(alone);
        }
        self.0.extend(b"\x85R");
        self.view(shape);
    }

    /// The rest of a tensor's arguments, and its call.
    fn view(&mut self, shape: &[usize]) {
        self.int(0);
        self.ints(shape);
        let strides: Vec<usize> = (0..shape.len()).map(|side| shape[side + 1..].iter().product()).collect();
        self.ints(&strides);
        self.0.push(0x89);
        self.global("collections", "OrderedDict");
        self.0.extend(b")RtR");
    }

    fn end(mut self) -> Vec<u8> {
        self.0.push(b'.');
        self.0
    }
}

/// Tensors by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The dictionary of tensors, perhaps in another one, beside what is no tensor.
fn pickled(tensors: &Tensors, within: Option<&str>) -> Vec<u8> {
    let mut p = Pickler::new();
    p.0.extend(b"}(");
    if let Some(name) = within {
        p.text("global_step");
        p.int(7);
        p.text("callbacks");
        p.global("pytorch_lightning.callbacks", "ModelCheckpoint");
        p.0.extend(b")R");
        p.text(name);
        p.global("collections", "OrderedDict");
        p.0.extend(b")R(");
    }
    for (key, (name, (shape, _))) in tensors.iter().enumerate() {
        p.text(name);
        p.tensor(&key.to_string(), shape);
    }
    p.0.extend(if within.is_some() { &b"uu"[..] } else { b"u" });
    p.end()
}

fn little(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn torch_zip(tensors: &Tensors, within: Option<&str>) -> Vec<u8> {
    let mut entries = vec![("archive/data.pkl".to_owned(), pickled(tensors, within))];
    let data = tensors.values().enumerate().map(|(key, (_, x))| (format!("archive/data/{key}"), little(x)));
    entries.extend(data.chain([("archive/version".to_owned(), b"3\n".to_vec())]));
    zip(&entries.iter().map(|(name, data)| (&name[..], data.clone())).collect::<Vec<_>>(), false)
}

/// The first three pickles of the form of before 2020.
fn legacy_start() -> Vec<u8> {
    let mut bytes = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.".to_vec();
    let mut machine = Pickler::new();
    machine.0.extend(b"}(");
    machine.text("little_endian");
    machine.0.extend(b"\x88u");
    bytes.extend(machine.end());
    bytes
}

/// The form of before 2020: five pickles, then the storages.
fn torch_legacy(tensors: &Tensors) -> Vec<u8> {
    let mut bytes = legacy_start();
    bytes.extend(pickled(tensors, None));
    let mut keys = Pickler::new();
    keys.0.extend(b"](");
    // In an order of its own.
    (0..tensors.len()).rev().for_each(|key| keys.text(&key.to_string()));
    keys.0.push(b'e');
    bytes.extend(keys.end());
    for (_, values) in tensors.values().rev() {
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(little(values));
    }
    bytes
}

/// A dictionary as `pickle.dump` writes it, each storage within it as bytes; at protocol 2 these are texts. Tensors of a part
/// that has a name are in a dictionary of that name.
fn dumped(protocol: u8, parts: &[(&str, &Tensors)]) -> Vec<u8> {
    let mut p = Pickler(vec![0x80, protocol]);
    p.0.extend(b"}(");
    for (name, tensors) in parts {
        if !name.is_empty() {
            p.text(name);
            p.0.extend(b"}(");
        }
        tensors.iter().for_each(|(name, (shape, values))| p.alone(name, shape, values));
        if !name.is_empty() {
            p.0.push(b'u');
        }
    }
    p.0.push(b'u');
    p.end()
}

/// What `torch.save` makes of a storage alone.
fn storage(values: &[f32]) -> Vec<u8> {
    let mut bytes = legacy_start();
    let mut about = Pickler::new();
    about.stored("0", values.len());
    bytes.extend(about.end());
    let mut keys = Pickler::new();
    keys.0.push(b']');
    keys.text("0");
    keys.0.push(b'a');
    bytes.extend(keys.end());
    bytes.extend((values.len() as u64).to_le_bytes());
    bytes.extend(little(values));
    bytes
}

fn prefixed(tensors: &Tensors, prefix: &str) -> Tensors {
    tensors.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect()
}

#[test]
fn what_torch_and_pickle_write_is_read_and_damage_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.pt");
    let tensors: Tensors = BTreeMap::from([
        ("a.weight".into(), (vec![2, 3], (0..6).map(|x| x as f32 / 4.0).collect())),
        ("b".into(), (vec![], vec![-7.5])),
    ]);
    let same = |file: &SafeFile| {
        assert_eq!(file.names().collect::<Vec<_>>(), ["a.weight", "b"]);
        assert_eq!(
            (file.shape("a.weight").unwrap(), file.f32("a.weight").unwrap()),
            (&[2, 3][..], tensors["a.weight"].1.clone())
        );
        assert_eq!((file.shape("b").unwrap(), file.f32("b").unwrap()), (&[][..], vec![-7.5]));
    };
    let wrapped = torch_zip(&prefixed(&tensors, "module."), Some("state_dict"));
    let saved = [torch_zip(&tensors, None), torch_zip(&tensors, Some("ema")), torch_legacy(&tensors), wrapped];
    let dumps = [2, 3, 5].map(|protocol| dumped(protocol, &[("", &tensors)]));
    for bytes in saved.into_iter().chain(dumps).chain([dumped(4, &[("ema", &tensors)])]) {
        fs::write(&path, &bytes).unwrap();
        same(&weights::open(&path).unwrap());
        for length in (0..bytes.len()).step_by(7) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(weights::open(&path).is_err(), "{length} of {} bytes", bytes.len());
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x55;
            fs::write(&path, &bad).unwrap();
            drop(weights::open(&path));
        }
    }
    let parts: Vec<_> = tensors.iter().map(|(name, (shape, x))| (name, shape, little(x))).collect();
    let out: Vec<safetensors::TensorOut> = parts.iter().map(|(n, s, b)| (&n[..], Dtype::F32, &s[..], &b[..])).collect();
    safetensors::write(&path, &out, &Default::default()).unwrap();
    same(&weights::open(&path).unwrap());
}

/// The bytes with the first `from` in them changed to `to`.
pub fn swapped(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let place = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..place], to, &bytes[place + from.len()..]].concat()
}

#[test]
fn a_flipped_bit_of_a_zip_is_no_weight() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.pt");
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        weights::open(&path).map(|file| file.f32("a").unwrap()).map_err(|error| error.to_string())
    };
    let whole = torch_zip(&BTreeMap::from([("a".into(), (vec![2], vec![3.0, 5.0]))]), None);
    let flipped = swapped(&whole, &5f32.to_le_bytes(), &7f32.to_le_bytes());
    let said = open(&flipped).unwrap_err();
    assert!(said.contains("w.pt: ") && said.contains("entry 'data/0' of a zip: checksum "), "{said}");
    // `torch.save` can be told to compute no checksums, and writes 0 then.
    let sum = crc32fast::hash(&little(&[3.0, 5.0])).to_le_bytes();
    let without = |bytes: &[u8]| swapped(&swapped(bytes, &sum, &[0; 4]), &sum, &[0; 4]);
    assert_eq!(open(&without(&whole)).unwrap(), [3.0, 5.0]);
    // Two entries in one place could be read again and again.
    let big = vec![1; 1000];
    let entries = [("a/data.pkl", big.clone()), ("a/data/0", big)];
    let twice = zip(&entries, false);
    let at = twice.windows(10).rposition(|window| window == b"a/data.pkl").unwrap();
    let entry = &twice[at - 46..at + 10];
    let end = twice.windows(4).rposition(|window| window == b"PK\x05\x06").unwrap();
    let mut hostile = [&twice[..end], entry, entry, &twice[end..]].concat();
    let end = end + 2 * entry.len();
    for (place, more) in [(end + 8, 2), (end + 10, 2), (end + 12, 2 * entry.len() as u8)] {
        hostile[place] += more;
    }
    let said = open(&hostile).unwrap_err();
    assert!(said.contains("a zip whose entries overlap"), "{said}");
}

#[test]
fn tensors_of_other_types_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.pt");
    let tensors: Tensors =
        BTreeMap::from([("a".into(), (vec![2], vec![3.0, 5.0])), ("b".into(), (vec![1], vec![1.0]))]);
    let open = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        weights::open(&path).map(|file| file.f32("a").unwrap()).map_err(|error| error.to_string())
    };
    // The last storage becomes one of other numbers, as long as before; and its tensor becomes something else.
    let p = pickled(&tensors, None);
    let at = p.windows(12).rposition(|window| window == b"FloatStorage").unwrap();
    let mut p = [&p[..at], b"QInt32Storage", &p[at + 12..]].concat();
    let zipped = |p: &[u8]| {
        let [a, b] = [&[3.0, 5.0][..], &[1.0]].map(little);
        zip(&[("x/data.pkl", p.to_vec()), ("x/data/0", a), ("x/data/1", b)], false)
    };
    let legacy = |p: &[u8]| swapped(&torch_legacy(&tensors), &pickled(&tensors, None), p);
    for bytes in [zipped(&p), legacy(&p)] {
        assert_eq!(open(bytes).unwrap(), [3.0, 5.0]);
        assert!(!weights::open(&path).unwrap().contains("b"));
    }
    let last = p.windows(18).rposition(|window| window == b"_rebuild_tensor_v2").unwrap();
    p[last + 17] = b'9';
    for bytes in [zipped(&p), legacy(&p)] {
        assert_eq!(open(bytes).unwrap(), [3.0, 5.0]);
    }
}

/// Resident memory of this process, but for that of mapped files.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: Vec<usize> = pages.split_whitespace().map(|pages| pages.parse().unwrap()).collect();
    (pages[1] - pages[2]) * 4096
}

#[cfg(target_os = "linux")]
#[test]
fn an_autoencoder_out_of_a_checkpoint_keeps_nothing_of_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v1.ckpt");
    autoencoder::write(&path, &autoencoder::sd_vae(&[32, 64], 1));
    let file = SafeFile::open(&path).unwrap();
    let tensor = |name: &str| (name.to_owned(), (file.shape(name).unwrap().to_vec(), file.f32(name).unwrap()));
    let mut whole = prefixed(&file.names().map(tensor).collect(), "first_stage_model.");
    const VALUES: usize = 32 << 20;
    whole.insert("model.diffusion_model.out".into(), (vec![VALUES], vec![0.5; VALUES]));
    fs::write(&path, torch_zip(&whole, Some("state_dict"))).unwrap();
    drop((file, whole));
    // Other tests run meanwhile.
    let before = resident();
    let small = || assert!(resident() < before + 2 * VALUES, "{} MiB before, {} after", before >> 20, resident() >> 20);
    let all = weights::open(&path).unwrap();
    small();
    assert_eq!(all.bytes("model.diffusion_model.out").unwrap()[4 * VALUES - 4..], 0.5f32.to_le_bytes());
    let opened = CodecFile::open(&path).unwrap();
    small();
    drop((all, opened));
}

/// Names of the latent diffusion model's authors, of those of `diffusers`.
fn first_names(name: &str, levels: usize) -> String {
    let mut name = name.to_owned();
    for level in 0..levels {
        let other = levels - 1 - level;
        name = name.replace(&format!("encoder.down_blocks.{level}.resnets."), &format!("encoder.down.{level}.block."));
        name = name.replace(
            &format!("encoder.down_blocks.{level}.downsamplers.0."),
            &format!("encoder.down.{level}.downsample."),
        );
        name = name.replace(&format!("decoder.up_blocks.{level}.resnets."), &format!("decoder.up.{other}.block."));
        name =
            name.replace(&format!("decoder.up_blocks.{level}.upsamplers.0."), &format!("decoder.up.{other}.upsample."));
    }
    for (theirs, first) in [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ] {
        name = name.replace(theirs, first);
    }
    name
}

#[test]
fn an_autoencoder_is_known_by_its_first_names_in_a_checkpoint_of_stable_diffusion() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vae.safetensors");
    let channels = [32, 64, 64];
    let vae = autoencoder::sd_vae(&channels, 1);
    autoencoder::write(&path, &vae);
    let file = SafeFile::open(&path).unwrap();
    let expected = CodecFile::open(&path).unwrap().autoencoder().unwrap().unwrap().fingerprint;
    let mut renamed = Tensors::new();
    for name in file.names() {
        let mut shape = file.shape(name).unwrap().to_vec();
        if name.contains(".to_") && shape.len() == 2 {
            shape.extend([1, 1]);
        }
        renamed.insert(first_names(name, channels.len()), (shape, file.f32(name).unwrap()));
    }
    assert!(
        renamed.contains_key("decoder.up.2.block.0.norm1.weight")
            && !renamed.keys().any(|name| name.contains("_blocks"))
    );
    let mut training = renamed.clone();
    training.insert("loss.logvar".into(), (vec![], vec![0.0]));
    let mut whole = prefixed(&renamed, "first_stage_model.");
    whole.insert("model.diffusion_model.input_blocks.0.0.weight".into(), (vec![2], vec![0.0; 2]));
    let ckpt = dir.path().join("v1.ckpt");
    for bytes in
        [torch_zip(&training, Some("state_dict")), torch_zip(&whole, Some("state_dict")), torch_legacy(&renamed)]
    {
        fs::write(&ckpt, bytes).unwrap();
        let opened = CodecFile::open(&ckpt).unwrap();
        assert_eq!((opened.network(), opened.factor()), (AutoencoderKind::SdVae, 4));
        assert_eq!(opened.autoencoder().unwrap().unwrap().fingerprint, expected, "the same encoder");
    }
    // It is called what it is where a model is expected, whatever its names are.
    for vae in [&path, &ckpt] {
        let why = Model::load(vae).map(|_| ()).unwrap_err().to_string();
        assert!(why.contains("an autoencoder, expected a model of images"), "{why}");
    }
    renamed.insert("decoder.up.2.block.7.conv1.weight".into(), (vec![1], vec![0.0]));
    fs::write(&ckpt, torch_zip(&renamed, None)).unwrap();
    assert!(CodecFile::open(&ckpt).unwrap_err().to_string().contains("decoder.up_blocks.0.resnets.7.conv1.weight"));
}

#[test]
fn a_bare_state_dict_of_a_network_has_its_config_read_off_its_shapes() {
    let dir = tempfile::tempdir().unwrap();
    for (label_dim, mult, attention) in [(5, vec![1, 2], vec![8]), (0, vec![1, 2, 3], vec![])] {
        let json = serde_json::json!({
            "img_resolution": 16, "img_channels": 4, "label_dim": label_dim, "model_channels": 64, "channel_mult": mult,
            "num_blocks": 2, "attn_resolutions": attention, "logvar_channels": 12,
        });
        let config: Config = serde_json::from_value(json).unwrap();
        let model = Model::init(&config, 3).unwrap();
        let tensors: Tensors = model
            .table
            .iter()
            .zip(&model.weights)
            .map(|((_, spec), values)| (spec.name.clone(), (spec.shape.clone(), values.clone())))
            .collect();
        for (name, bytes) in [
            ("bare.pt", torch_zip(&tensors, None)),
            ("ema.pth", torch_zip(&prefixed(&tensors, "module.ema."), Some("state_dict"))),
            ("old.pkl", torch_legacy(&prefixed(&tensors, "net."))),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            let read = Model::load(&path).unwrap();
            let found = &read.net.config;
            let facts = |c: &Config| {
                (c.level_channels(), c.noise_channels(), c.emb_channels(), c.num_blocks, c.attn_resolutions.clone())
            };
            assert_eq!(facts(found), facts(&config), "{name}");
            assert_eq!((found.img_resolution, found.label_dim, found.img_channels), (16, label_dim, 4));
            assert!(read.weights == model.weights, "{name}");
        }
    }
    // What is none says so, and NVIDIA's snapshots are sent to `import`.
    let other = dir.path().join("other.pt");
    fs::write(&other, torch_zip(&BTreeMap::from([("x".into(), (vec![1], vec![0.0]))]), None)).unwrap();
    let why = |path: &Path| ModelFile::open(path).map(|_| ()).unwrap_err().to_string();
    assert!(why(&other).contains("so this is not a model file"));
    let snapshot = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/official_style_snapshot_nosrc.pkl");
    assert!(why(&snapshot).contains("`edm2k import` reads NVIDIA's snapshots"), "{}", why(&snapshot));
}

#[test]
fn the_width_of_attention_heads_is_assumed_with_a_warning_or_given() {
    let dir = tempfile::tempdir().unwrap();
    for (width, heads) in [(64, 32), (32, 16)] {
        let config = serde_json::json!({
            "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": width, "channel_mult": [1],
            "num_blocks": 1, "channels_per_head": heads,
        });
        let config: Config = serde_json::from_value(config).unwrap();
        let model = Model::init(&config, 1).unwrap();
        let named = model.table.iter().zip(&model.weights);
        let tensors = named.map(|((_, spec), x)| (spec.name.clone(), (spec.shape.clone(), x.clone()))).collect();
        fs::write(dir.path().join("bare.pt"), torch_zip(&tensors, None)).unwrap();
        let unsaid = "does not say how wide attention heads are";
        if width == 64 {
            let said = edm2k(dir.path(), &["sample", "--model", "bare.pt", "--outdir", "out", "--steps", "1"]).assert();
            let said = String::from_utf8(said.success().get_output().stderr.clone()).unwrap();
            assert!(said.contains(&format!("warning: bare.pt: it {unsaid}, 64 is assumed")), "{said}");
            let info = printed(edm2k(dir.path(), &["info", "bare.pt"]).assert());
            assert!(info.contains(&format!("note           it {unsaid}")), "{info}");
        } else {
            let why = refused(edm2k(dir.path(), &["info", "bare.pt"]).assert());
            assert!(why.contains(&format!("{unsaid}, and as in EDM2 they cannot be: channels_per_head = 64")), "{why}");
        }
        let json = format!("{{\"channels_per_head\": {heads}, \"clip_act\": 7}}");
        fs::write(dir.path().join("net.json"), json).unwrap();
        let import = ["import", "bare.pt", "--config", "net.json", "--out", "model.safetensors", "--overwrite"];
        edm2k(dir.path(), &import).assert().success();
        let read = Model::load(dir.path().join("model.safetensors")).unwrap();
        assert_eq!((read.net.config.channels_per_head, read.net.config.clip_act), (heads, 7.0));
        assert!(read.weights == model.weights && read.doubts.is_empty());
    }
    // Without a config it is no snapshot, and needs no import.
    let why = refused(edm2k(dir.path(), &["import", "bare.pt", "--out", "again.safetensors"]).assert());
    assert!(why.contains("is read as it is where one is expected"), "{why}");
    fs::write(dir.path().join("dump.pkl"), dumped(4, &[("net", &Tensors::new())])).unwrap();
    let why = refused(edm2k(dir.path(), &["import", "dump.pkl", "--out", "again.safetensors"]).assert());
    assert!(why.contains("it has no ema, as snapshots have; weights alone are read as a model as they are"), "{why}");
    let again = ["import", "model.safetensors", "--config", "net.json", "--out", "again.safetensors"];
    let why = refused(edm2k(dir.path(), &again).assert());
    assert!(why.contains("metadata \"config\": it is there"), "{why}");
    // The file that is at fault is named.
    let why = |file: &str, config: &str| {
        fs::write(dir.path().join("net.json"), config).unwrap();
        let wrong = ["import", file, "--config", "net.json", "--out", "again.safetensors"];
        refused(edm2k(dir.path(), &wrong).assert())
    };
    for (config, what) in [
        ("{\"heads\": 32}", "of the network in bare.pt: unknown field `heads`"),
        ("{\"clip_act\": \"x\"}", "of the network in bare.pt: clip_act: invalid type"),
        ("{\"channels_per_head\": 0}", "of the network in bare.pt: "),
        ("{\"channels_per_head\": 16, \"num_blocks\": 5}", "bare.pt: tensor "),
        ("{\"channels_per_head\": 16, \"img_channels\": 7}", "bare.pt: tensor "),
        ("[", "invalid type: a list, expected an object"),
    ] {
        let why = why("bare.pt", config);
        assert!(why.contains(&format!("error: --config net.json: {what}")), "{why}");
    }
    let model = why("model.safetensors", "{\"num_blocks\": 1}");
    assert!(model.contains("error: model.safetensors: metadata"), "{model}");
    let plain = refused(edm2k(dir.path(), &["import", "model.safetensors", "--out", "again.safetensors"]).assert());
    assert!(plain.contains("model.safetensors: a safetensors file, expected a snapshot"), "{plain}");
    let missing = why("missing.pt", "{}");
    assert!(missing.contains("error: missing.pt: "), "{missing}");
    fs::write(dir.path().join("damaged.pt"), "x").unwrap();
    let damaged = why("damaged.pt", "{}");
    assert!(damaged.contains("error: damaged.pt: "), "{damaged}");
}

#[test]
fn an_average_of_weights_goes_before_the_weights_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": 64, "channel_mult": [1], "num_blocks": 1,
    });
    let config: Config = serde_json::from_value(config).unwrap();
    let of = |seed: u64| -> (Model, Tensors) {
        let model = Model::init(&config, seed).unwrap();
        let named = model.table.iter().zip(&model.weights);
        let tensors = named.map(|((_, spec), x)| (spec.name.clone(), (spec.shape.clone(), x.clone()))).collect();
        (model, tensors)
    };
    let ((_, raw), (average, ema)) = (of(1), of(2));
    let path = dir.path().join("both.pt");
    for (parts, said) in [
        (vec![("net", &raw), ("ema", &ema)], "'ema', not 'net'"),
        (vec![("model_ema", &ema), ("model", &raw), ("state_dict", &raw)], "'model_ema', not 'state_dict', 'model'"),
        (vec![("", &prefixed(&raw, "online.")), ("", &prefixed(&ema, "model_ema."))], "'model_ema.', not 'online.'"),
    ] {
        fs::write(&path, dumped(4, &parts)).unwrap();
        let read = Model::load(&path).unwrap();
        assert!(read.weights == average.weights, "{said}");
        assert!(read.doubts[0].contains(&format!("its network is that of {said}")), "{:?}", read.doubts);
    }
    // What is called an average and has no tensors is none.
    fs::write(&path, dumped(4, &[("ema", &Tensors::new()), ("net", &ema)])).unwrap();
    assert!(Model::load(&path).unwrap().weights == average.weights);
    let info = printed(here(&["info", path.to_str().unwrap()]).assert());
    assert!(!info.contains("its network"), "{info}");
    fs::write(&path, dumped(4, &[("generator", &raw), ("step", &Tensors::new())])).unwrap();
    let why = weights::open(&path).unwrap_err().to_string();
    assert!(
        why.contains(
            "found a dictionary of 'generator', 'step', expected tensors of floats or integers, or some within ema, "
        ),
        "{why}"
    );
    // Nor is one that keeps only how fast it follows.
    let decay = Tensors::from([("decay".into(), (vec![], vec![0.999])), ("updates".into(), (vec![1], vec![7.0]))]);
    fs::write(&path, dumped(4, &[("ema", &decay), ("state_dict", &ema)])).unwrap();
    let read = Model::load(&path).unwrap();
    assert!(read.weights == average.weights && !read.doubts.iter().any(|doubt| doubt.contains("its network")));
}

/// A view may show an element many times, or elements in an order of its own.
#[test]
fn views_are_gathered_within_four_times_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.pt");
    let open = |shape: &[usize], strides: &[usize]| {
        let mut p = Pickler::new();
        p.0.extend(b"}(");
        p.text("a");
        p.global("torch._utils", "_rebuild_tensor_v2");
        p.0.push(b'(');
        p.stored("0", 6);
        p.int(0);
        p.ints(shape);
        p.ints(strides);
        p.0.push(0x89);
        p.global("collections", "OrderedDict");
        p.0.extend(b")RtRu");
        let data = little(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        fs::write(&path, zip(&[("x/data.pkl", p.end()), ("x/data/0", data)], false)).unwrap();
        weights::open(&path).map(|file| file.f32("a").unwrap()).map_err(|error| error.to_string())
    };
    assert_eq!(open(&[2, 3], &[3, 1]).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(open(&[3, 2], &[1, 3]).unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(open(&[1, 2], &[77, 1]).unwrap(), [0.0, 1.0]);
    assert_eq!(open(&[3, 4], &[1, 0]).unwrap(), [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]);
    assert_eq!(open(&[0, 1 << 20, 1 << 20], &[9, 9, 9]).unwrap(), [0.0; 0]);
    assert!(open(&[7], &[1]).unwrap_err().contains("a tensor that is not within the 6 elements of its storage"));
    assert!(open(&[1 << 30], &[0]).unwrap_err().contains("tensors of four times the file's size"));
}

/// Its first two bytes are those of a pickle too.
#[test]
fn a_safetensors_file_is_none_of_pytorch_s_whatever_the_length_of_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    for protocol in 2..6usize {
        let tensor = r#"{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}"#;
        let length = 0x80 + 256 * protocol;
        let header = [(length as u64).to_le_bytes().to_vec(), format!("{tensor:length$}").into_bytes()].concat();
        fs::write(&path, [header, little(&[7.0])].concat()).unwrap();
        assert_eq!(weights::open(&path).unwrap().f32("a").unwrap(), [7.0], "{length}");
    }
}
