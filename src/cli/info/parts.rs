//! What is said of the networks beside the U-Net (condition models, autoencoders, those in ONNX files), and of pictures.

use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

use edm2k::codec::CodecFile;
use edm2k::condition::vae::Vae;
use edm2k::formats::fingerprint::Identity;
use edm2k::formats::{At, fingerprint};
use edm2k::onnx::{About, Port};
use edm2k::pictures::png;

use super::head;
use crate::cli::say::out;

/// Shows a model that invents conditions.
pub fn condition_model(path: &Path, vae: &Vae, json: bool) -> anyhow::Result<()> {
    let header = vae.header();
    let conditioning = vae.meaning().conditioning.unwrap_or_default();
    let identity = Identity::of_file(path).at(path)?;
    if json {
        let shown = json!({
            "kind": "condition model", "header": header, "parameters": vae.parameters(), "anchors": vae.anchors(),
            "fingerprint": identity.fingerprint,
        });
        out!("{shown}");
        return Ok(());
    }
    out!("a model that invents conditions");
    out!("parameters     {} ({:.1} M), {} anchors", vae.parameters(), vae.parameters() as f64 / 1e6, vae.anchors());
    out!("condition      {} values", header.width);
    out!("conditions are {conditioning}");
    out!("layers         {} hidden units, {} latents", header.hidden, header.latent);
    let tags: Vec<&str> = header.vocabulary.iter().map(|tag| tag.tag.as_str()).collect();
    out!("vocabulary     {} tags{}{}", tags.len(), if tags.is_empty() { "" } else { ": " }, head(&tags));
    out!("file           {identity}");
    Ok(())
}

/// Shows an autoencoder.
pub fn autoencoder(path: &Path, json: bool) -> anyhow::Result<()> {
    let file = CodecFile::open(path)?;
    let [encoder, decoder] = file.halves();
    let (made_by, factor) = (file.autoencoder()?, file.factor());
    if json {
        let shown = json!({
            "kind": "autoencoder", "network": file.network(), "factor": factor, "channels": file.channels(),
            "encoder": encoder, "decoder": decoder, "fingerprint": made_by.map(|made_by| made_by.fingerprint),
        });
        out!("{shown}");
        return Ok(());
    }
    let has = match (encoder, decoder) {
        (true, true) => "encoder and decoder",
        (true, false) => "encoder only",
        (false, _) => "decoder only",
    };
    out!("an autoencoder: {}, {has}", file.network());
    out!("factor         {factor} pixels for a latent, in each direction");
    let channels: Vec<String> = file.channels().iter().map(ToString::to_string).collect();
    out!("channels       {}", channels.join(", "));
    match made_by {
        Some(made_by) => out!("latents are of {made_by}"),
        None => out!("latents are of nobody: without an encoder it makes none"),
    }
    Ok(())
}

/// Shows what a picture says that it was made with.
pub fn picture(path: &Path, json: bool) -> anyhow::Result<()> {
    let texts = png::read_text(path)?;
    let text = texts.iter().find(|(key, _)| key == "edm2k").map(|(_, text)| text);
    let text = text.with_context(|| format!("{}: a PNG that says nothing of edm2k", path.display()))?;
    let about: Map<String, Value> =
        serde_json::from_str(text).with_context(|| format!("{}: its text chunk", path.display()))?;
    if json {
        out!("{}", json!({"kind": "picture", "parameters": about}));
        return Ok(());
    }
    out!("a picture made by edm2k");
    // JSON escapes what a terminal would take for a command.
    let plain = |text: &&str| !text.contains(char::is_control);
    let shown = |value: &Value| value.as_str().filter(plain).map_or_else(|| value.to_string(), String::from);
    for (name, value) in &about {
        match value {
            Value::Object(parts) => {
                out!("{name}");
                parts.iter().for_each(|(name, value)| out!("  {name:20} {}", shown(value)));
            }
            _ => out!("{name:14} {}", shown(value)),
        }
    }
    Ok(())
}

/// Shows a network in an ONNX file.
pub fn onnx(path: &Path, json: bool) -> anyhow::Result<()> {
    let about = About::open(path)?;
    if json {
        let mut shown = json!(about);
        shown["kind"] = "onnx".into();
        out!("{shown}");
        return Ok(());
    }
    out!("a network in ONNX: {}", fingerprint::name(path));
    let of = |what: &str, ports: &[Port]| {
        for (number, Port { name, kind, shape }) in ports.iter().enumerate() {
            out!("{:15}{name}: {kind} [{}]", if number == 0 { what } else { "" }, shape.join(", "));
        }
    };
    of("inputs", &about.inputs);
    of("outputs", &about.outputs);
    out!("nodes          {}, weights of {} values", about.nodes, about.values);
    if let Some(features) = &about.features {
        out!("features       {features}, as `prepare --tagger` takes them");
    }
    if !about.unsupported.is_empty() {
        out!("unsupported    {}", about.unsupported.join(", "));
    }
    if !about.producer.is_empty() {
        out!("made by        {}", about.producer);
    }
    out!("fingerprint    {}", about.fingerprint);
    Ok(())
}
