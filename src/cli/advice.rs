//! Errors in one line, with the options that help: the library knows none of them.

use std::error::Error;

use edm2k::DeviceError;
use edm2k::backend::gpu::runtime::PARAMETERS;
use edm2k::data::prepare::{DropReason, PrepareError};
use edm2k::model::ModelError;
use edm2k::model::error::OtherFile;
use edm2k::pipeline::{ConditionError, OutputError};
use edm2k::train::TrainError;

/// An error and its causes, but those that it quotes itself, and what to do about it.
pub fn in_one_line(error: &anyhow::Error) -> String {
    let (mut line, mut advised) = (String::new(), None);
    for cause in error.chain() {
        let text = cause.to_string();
        if !line.contains(&text) {
            line += &format!("{}{text}", if line.is_empty() { "" } else { ": " });
        }
        advised = advised.or_else(|| advice(cause));
    }
    match advised {
        Some(advice) => format!("{line}; {advice}"),
        None => line,
    }
}

fn advice(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if let Some(OutputError::Exists { .. } | OutputError::Meanwhile { .. }) = error.downcast_ref() {
        return Some("give --overwrite, or another --outdir");
    }
    if let Some(OutputError::Directory { .. }) = error.downcast_ref() {
        return Some("--outdir names another");
    }
    match error.downcast_ref() {
        Some(DeviceError::OutOfMemory { purpose, .. }) => {
            return (*purpose != PARAMETERS).then_some("--batch sets how many, in training --batch-gpu");
        }
        Some(DeviceError::NotBuilt(_)) => return Some("--device cpu always is there"),
        Some(DeviceError::NoLoop(_)) => return Some("--conv-loop names it"),
        Some(DeviceError::Averages { .. }) => return Some("--ema names them"),
        _ => {}
    }
    if let Some(ConditionError::ClassOfTags { .. }) = error.downcast_ref() {
        return Some("--tags takes their names");
    }
    match error.downcast_ref() {
        Some(ModelError::Checkpoint { .. }) => return Some("`edm2k export --from-checkpoint` makes a model of it"),
        Some(ModelError::Heads { .. }) => return Some("`edm2k import --config` sets the width"),
        Some(ModelError::Other { what: OtherFile::ConditionModel, .. }) => return Some("--condition-model takes it"),
        Some(ModelError::Other { what: OtherFile::Autoencoder, .. }) => return Some("--vae takes it"),
        Some(ModelError::Other { what: OtherFile::Conditions, .. }) => return Some("--conditions takes it"),
        _ => {}
    }
    match error.downcast_ref() {
        Some(TrainError::AllDamaged { .. }) => return Some("--restart sets aside what is there, and begins anew"),
        Some(TrainError::Grown { .. }) => return Some("--init takes one, with another --outdir"),
        Some(TrainError::Settings { .. }) => return Some("--outdir names another"),
        _ => {}
    }
    match error.downcast_ref()? {
        PrepareError::OtherRecords { .. } => Some("--add, --retag and --out do that"),
        PrepareError::Added { .. } => Some("--add does that"),
        PrepareError::NothingKept { dropped, .. } if dropped.0.contains_key(&DropReason::Cropped) => {
            Some("a larger --max-crop keeps more")
        }
        PrepareError::Memory(_) => Some("--shard-size sets how large they are"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use edm2k::backend::BackendError;
    use edm2k::codec::CodecError;
    use edm2k::memory::TooLarge;
    use edm2k::pipeline::PipelineError;
    use edm2k::sample::SampleError;
    #[cfg(feature = "serve")]
    use edm2k::serve::ServeError;
    use edm2k::train::GridError;

    #[test]
    fn errors_within_others_have_their_advice() {
        let lacks = |purpose| {
            let (device, advice) = ("a card".into(), "take less");
            BackendError::from(DeviceError::OutOfMemory { device, asked: None, purpose, free: 0, total: 0, advice })
        };
        let sampling = |purpose| {
            in_one_line(&anyhow::Error::from(PipelineError::from(SampleError::from(lacks(purpose)))).context("--model"))
        };
        let (activations, parameters) = (sampling("activations"), sampling(PARAMETERS));
        assert!(activations.starts_with("--model: out of device memory: "), "{activations}");
        assert!(activations.ends_with("; take less; --batch sets how many, in training --batch-gpu"), "{activations}");
        assert_eq!(activations.matches("out of device memory").count(), 1);
        assert!(parameters.ends_with("; take less"), "{parameters}");
        let others: [anyhow::Error; 2] = [
            PrepareError::from(CodecError::from(lacks("activations"))).into(),
            TrainError::from(GridError::from(CodecError::from(lacks("activations")))).into(),
        ];
        for error in others {
            assert_eq!(format!("--model: {}", in_one_line(&error)), activations);
        }
        let averages = TrainError::from(BackendError::from(DeviceError::Averages { found: 9, most: 8 }));
        assert_eq!(in_one_line(&averages.into()), "9 moving averages, at most 8 on a GPU; --ema names them");
        let path = "run/checkpoint.safetensors".into();
        let checkpoint = Err::<(), _>(TrainError::from(ModelError::Checkpoint { path })).context("--init");
        let said = in_one_line(&checkpoint.unwrap_err());
        let expected = "--init: run/checkpoint.safetensors: a checkpoint of a run, expected a model of images; \
                        `edm2k export --from-checkpoint` makes a model of it";
        assert_eq!(said, expected);
        #[cfg(feature = "serve")]
        {
            let serving = ServeError::from(ModelError::Checkpoint { path: "run/checkpoint.safetensors".into() });
            assert!(expected.ends_with(&in_one_line(&serving.into())));
        }
        assert_eq!(in_one_line(&anyhow::anyhow!("wrong").context("file")), "file: wrong");
        // It quotes its cause.
        let memory =
            PrepareError::Memory(TooLarge { what: "a shard".into(), needed: 2, there: 1, whose: "this machine has" });
        assert_eq!(in_one_line(&memory.into()).matches("a shard").count(), 1);
    }
}
