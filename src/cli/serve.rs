//! `edm2k serve`: a page and an API.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use edm2k::serve::{Files, Options, serve};

use super::DeviceArgs;
use super::say::note;
use super::signals::Requests;

/// Open a page to draw on, and an API.
#[derive(clap::Args)]
#[command(after_help = "\
The page draws pictures with live previews and shows training runs; docs/serve.md describes the
API, which is JSON under /api/v1, and for clients of AUTOMATIC1111's web UI under /sdapi/v1. Only
this machine can reach it unless --listen says otherwise, which needs a --token. Nothing is
written to disk without --outdir.

Examples:
  edm2k serve --model demo/emoji.safetensors --condition-model demo/conditions.safetensors
  edm2k serve --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors \\
      --preview taesd.safetensors
  edm2k serve --model 1girl-xs.safetensors --vae sd-vae-ft-mse.safetensors \\
      --tagger wd-swinv2-tagger-v3.onnx
  edm2k serve --model edm2-img512-xs.safetensors --vae sd-vae-ft-mse.safetensors \\
      --gnet edm2-img512-xs-uncond.safetensors --class-names imagenet.txt
  edm2k serve --runs runs --model runs/mine/snapshot-000200000-0.100.safetensors
  EDM2K_TOKEN=$(openssl rand -hex 16) edm2k serve --model emoji.safetensors --listen 0.0.0.0:7860")]
pub struct ServeArgs {
    /// Model file; repeatable, the first is what a request gets that names none
    #[arg(long = "model", value_name = "FILE", required_unless_present = "runs")]
    models: Vec<PathBuf>,
    /// Autoencoder that makes pictures of latents: an SD-VAE or a TAESD
    #[arg(long, value_name = "FILE")]
    vae: Option<PathBuf>,
    /// TAESD for live previews of latents [default: a linear map that is fitted to the --vae]
    #[arg(long, value_name = "FILE", requires = "vae")]
    preview: Option<PathBuf>,
    /// Network to guide away from (autoguidance), for the models that it goes with [default: the model without its condition]
    #[arg(long, value_name = "FILE")]
    gnet: Option<PathBuf>,
    /// Names of the classes of class-conditional models, a line for each, synonyms separated by commas
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
    /// Made by `edm2k condition train`: invents and completes conditions
    #[arg(long, value_name = "FILE")]
    condition_model: Option<PathBuf>,
    /// ONNX file of the tagger that made the features the models were trained on; pictures can be given then
    #[arg(long, value_name = "FILE")]
    tagger: Option<PathBuf>,
    /// Tensor of the features in it [default: what a WD tagger's classifier is given]
    #[arg(long, value_name = "NAME", requires = "tagger")]
    tagger_node: Option<String>,
    /// Directory of training runs to show, or one of them
    #[arg(long, value_name = "DIR")]
    runs: Option<PathBuf>,
    /// Directory that all pictures are also written to
    #[arg(long, value_name = "DIR")]
    outdir: Option<PathBuf>,
    /// Address (or host name) and port to listen on; a port alone means 127.0.0.1
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7860", value_parser = parse_listen)]
    listen: Listen,
    /// Another host name by which browsers may reach the server; repeatable
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Secret that clients must send, at least 16 characters; set EDM2K_TOKEN instead to hide it from other users
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// Images at a time, of one request or of several; changes speed and memory, not the images
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Where to listen, and the name that was given for it.
#[derive(Clone, Debug)]
struct Listen {
    address: SocketAddr,
    name: Option<String>,
}

/// The first address that a name has, of the older kind if there is one.
fn parse_listen(text: &str) -> Result<Listen, String> {
    let address = text.parse().ok().or_else(|| Some((Ipv4Addr::LOCALHOST, text.parse().ok()?).into()));
    if let Some(address) = address {
        return Ok(Listen { address, name: None });
    }
    let found = text.to_socket_addrs();
    let found: Vec<_> =
        found.map_err(|why| format!("{why}, expected an address and a port as in localhost:7860"))?.collect();
    let address = found.iter().find(|address| address.is_ipv4()).or(found.first()).ok_or("it has no address")?;
    Ok(Listen { address: *address, name: text.rsplit_once(':').map(|(name, _)| name.into()) })
}

/// Serves until it is told to stop.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    let requests = Requests::watch("stopping after this step");
    let files = Files {
        models: args.models,
        vae: args.vae,
        preview: args.preview,
        guide: args.gnet,
        class_names: args.class_names,
        condition_model: args.condition_model,
        tagger: args.tagger,
        tagger_node: args.tagger_node,
    };
    let token = args.token.or_else(|| std::env::var("EDM2K_TOKEN").ok());
    let options = Options {
        files,
        runs: args.runs,
        outdir: args.outdir,
        listen: args.listen.address,
        hosts: args.hosts.into_iter().chain(args.listen.name).collect(),
        token,
        batch: args.batch.into(),
    };
    // As `edm2k sample` computes.
    let device = args.device.open()?.fastest();
    requests.begin();
    serve(options, device, requests.stop, &mut |text| note!("{text}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::parse_listen;

    #[test]
    fn one_listens_at_addresses_names_and_ports() {
        for (text, address) in [("0.0.0.0:80", "0.0.0.0:80"), ("[::1]:7860", "[::1]:7860"), ("7883", "127.0.0.1:7883")]
        {
            let found = parse_listen(text).unwrap();
            assert_eq!((found.address.to_string().as_str(), found.name), (address, None));
        }
        let named = parse_listen("localhost:7883").unwrap();
        assert_eq!((named.address.to_string().as_str(), named.name.as_deref()), ("127.0.0.1:7883", Some("localhost")));
        for text in ["localhost", "70000", "127.0.0.1"] {
            assert!(parse_listen(text).unwrap_err().contains("expected an address and a port as in localhost:7860"));
        }
    }
}
