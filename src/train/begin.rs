//! How a run begins: from what its directory holds of it, or anew, and on all ranks in the same way.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use super::checkpoint::{self, Checkpoint};
use super::step::with_values;
use super::{
    CheckpointError, DataIdentity, Event, Execution, Model, ModelMeta, Precond, Settings, Splits, State, TrainError,
    files,
};
use crate::backend::{Slot, TrainingBackend};
use crate::collective::{Collective, CollectiveError};
use crate::data::dataset::Dataset;
use crate::formats::{At, AtomicFile, free_name, input, write_atomically};

/// Checks that a run's model, settings and images belong together.
pub(super) fn check(model: &Model, settings: &Settings, splits: Splits) -> Result<(), TrainError> {
    let config = &settings.config;
    let mismatch = |what: String| Err(TrainError::Mismatch(what));
    let (_, table) = Precond::new(config)?;
    if model.net.config != *config || model.table != table {
        return mismatch("the model is of another network than the settings'".into());
    }
    config.check_size(model.meta.height, model.meta.width)?;
    let tags = model.meta.vocabulary.len();
    if tags > 0 && tags != config.label_dim {
        return mismatch(format!("{tags} tags in the model's vocabulary, and a network for {}", config.label_dim));
    }
    model.meta.tags().map_err(|cause| TrainError::Mismatch(cause.to_string()))?;
    if settings.data != DataIdentity::of(splits.train) {
        return mismatch("the settings are for other images than those to train on".into());
    }
    for data in [Some(splits.train), splits.validation].into_iter().flatten() {
        config.check_sizes(&data.sizes())?;
        let (channels, dim) = (data.shape()[2], data.condition_dim());
        if channels != config.img_channels {
            return mismatch(format!("images of {channels} channels, and a network for {}", config.img_channels));
        }
        if config.label_dim != 0 && dim != config.label_dim {
            return mismatch(format!("conditions of {dim} values, and a network for {}", config.label_dim));
        }
    }
    let sizes = |data: &Dataset| data.header().all_sizes();
    match splits.validation.is_none_or(|validation| sizes(validation) == sizes(splits.train)) {
        true => Ok(()),
        false => mismatch("the validation split is not of the same size".into()),
    }
}

/// Where rank 0 begins: at the newest checkpoint, else with the model.
pub(super) fn first_state<B: TrainingBackend>(
    backend: &mut B,
    model: &Model,
    settings: &Settings,
    execution: &Execution,
    data: &Dataset,
    event: &mut dyn FnMut(Event),
) -> Result<State, TrainError> {
    let dir = execution.outdir.as_path();
    if execution.restart {
        set_aside(dir, event).at(dir)?;
    }
    if let Some(state) = newest(backend, settings, execution, data, event)? {
        return Ok(state);
    }
    begin_anew(dir, settings, event).at(dir)?;
    model.upload(backend, Slot::Weight)?;
    (0..settings.ema.len()).try_for_each(|i| model.upload(backend, Slot::Ema(i)))?;
    Ok(State::beginning(settings, execution))
}

/// Moves what a run has made into a folder of its own.
fn set_aside(dir: &Path, event: &mut dyn FnMut(Event)) -> io::Result<()> {
    let made = files::made_by_runs(dir)?;
    if made.is_empty() {
        return Ok(());
    }
    let old = free_name(&dir.join("before"), "restart");
    fs::create_dir(&old)?;
    made.iter().try_for_each(|name| fs::rename(dir.join(name), old.join(name)))?;
    event(Event::Note(format!("set aside {} files of the run before in {}", made.len(), old.display())));
    Ok(())
}

/// Sets aside what a directory without a checkpoint has of another run, or of one with other options. If the options'
/// file beside it is that of this run, everything stays: it will all be written again, with the same bits.
fn begin_anew(dir: &Path, settings: &Settings, event: &mut dyn FnMut(Event)) -> io::Result<()> {
    let options = dir.join(files::OPTIONS);
    let then = input::text(&options).ok().and_then(|text| serde_json::from_str::<Settings>(&text).ok());
    // A run that was killed before it wrote a line of statistics has an empty file of them.
    let nothing = |name: &Path| name.symlink_metadata().is_ok_and(|about| about.is_file() && about.len() == 0);
    let made = files::made_by_runs(dir)?.into_iter().filter(|name| name != files::OPTIONS && !nothing(&dir.join(name)));
    if made.count() > 0 {
        // Without a checkpoint the run needs what it began from.
        let same =
            |then: &Settings| then.init.is_none() == settings.init.is_none() && then.differences(settings).is_empty();
        match then.as_ref().is_some_and(same) {
            true => event(Event::Note(format!("no checkpoint is left in {}: the run begins again", dir.display()))),
            false => set_aside(dir, event)?,
        }
    }
    Ok(())
}

/// Writes the options' file. A file of that name that is somebody's own is set aside.
pub(super) fn write_options(dir: &Path, settings: &Settings) -> io::Result<()> {
    let path = dir.join(files::OPTIONS);
    let ours = input::text(&path).is_ok_and(|text| serde_json::from_str::<Settings>(&text).is_ok());
    if path.symlink_metadata().is_ok() && !ours {
        fs::rename(&path, free_name(&path, "foreign"))?;
    }
    let text = serde_json::to_string_pretty(settings)?;
    write_atomically(&path, |out| writeln!(out, "{text}"))
}

/// Loads the newest whole checkpoint; damaged ones are set aside and named. Nothing is touched if none is whole.
fn newest<B: TrainingBackend>(
    backend: &mut B,
    settings: &Settings,
    execution: &Execution,
    data: &Dataset,
    event: &mut dyn FnMut(Event),
) -> Result<Option<State>, TrainError> {
    let dir = execution.outdir.as_path();
    let table = backend.table().clone();
    let mut damaged = Vec::new();
    for path in checkpoint::list(dir).at(dir)? {
        let opened = Checkpoint::open(&path).map_err(TrainError::from).and_then(|checkpoint| {
            let mut asked = settings.clone();
            if execution.keep_rampup {
                asked.rampup = checkpoint.state.settings.rampup;
            }
            let nimg = checkpoint.state.nimg;
            if dir.join(files::checkpoint(nimg)) != path {
                let what = format!("it is of {nimg} images, not of as many as its name says");
                return Err(CheckpointError::Damaged { path: path.clone(), what }.into());
            }
            let then = &checkpoint.state.settings.data;
            if let (Some(then_print), Some(now_print)) = (then.content, settings.data.content)
                && data.grown_from(then_print)
            {
                let (path, then, now) = (path.clone(), then.images, data.len());
                return Err(TrainError::Grown { path, then, then_print, now, now_print });
            }
            asked.init = asked.init.or_else(|| checkpoint.state.settings.init.clone());
            let differences = checkpoint.state.settings.differences(&asked);
            if !differences.is_empty() {
                return Err(TrainError::Settings { path: path.clone(), differences });
            }
            checkpoint.check(&table)?;
            Ok((checkpoint, asked))
        });
        let (checkpoint, settings) = match opened {
            Err(TrainError::Checkpoint(error @ CheckpointError::Damaged { .. })) => {
                damaged.push((path, error));
                continue;
            }
            other => other?,
        };
        for (path, error) in damaged {
            let aside = free_name(&path, "damaged");
            fs::rename(&path, &aside).at(&path)?;
            event(Event::Note(format!("{error}; set aside as {}", aside.display())));
        }
        checkpoint.load(backend)?;
        event(Event::Note(format!("resuming from {}", path.display())));
        let before = &checkpoint.state.computed_on;
        if !before.is_empty() && *before != execution.computed_on {
            let now = &execution.computed_on;
            event(Event::Warning(format!("computed on {before} so far, on {now} from here: it rounds otherwise")));
        }
        let now = execution.batch_gpu.min(settings.batch);
        if let Some(before) = checkpoint.state.batch_gpu.filter(|&before| before != now) {
            event(Event::Warning(format!(
                "{before} images at a time so far, {now} from here: it rounds otherwise (--batch-gpu)"
            )));
        }
        return Ok(Some(State { settings, computed_on: execution.computed_on.clone(), ..checkpoint.state }));
    }
    let more = damaged.len().saturating_sub(1);
    match damaged.into_iter().next() {
        None => Ok(None),
        Some((_, first)) => Err(TrainError::AllDamaged { dir: dir.into(), first, more }),
    }
}

/// Has all ranks begin where rank 0 does, with its state, what it says of its models, and the values that its device holds.
pub(super) fn begin_together<B: TrainingBackend>(
    backend: &mut B,
    ranks: &mut dyn Collective,
    state: Option<State>,
    meta: ModelMeta,
) -> Result<(State, ModelMeta), TrainError> {
    let state = match state {
        Some(state) if ranks.size() == 1 => return Ok((state, meta)),
        state => state,
    };
    let text = state.map(|state| serde_json::to_string(&(state, meta)).unwrap_or_default()).unwrap_or_default();
    let (state, meta): (State, ModelMeta) = serde_json::from_slice(&ranks.gather(text.as_bytes())?[0])
        .map_err(|cause| CollectiveError::Differs(format!("what rank 0 begins with: {cause}")))?;
    let averages = (0..state.settings.ema.len()).map(Slot::Ema);
    for slot in [Slot::Weight, Slot::AdamM, Slot::AdamV].into_iter().chain(averages) {
        for portion in 0..backend.portions().ids().len() {
            with_values(backend, slot, portion, |values| ranks.broadcast(values))?;
        }
    }
    ranks.barrier()?;
    Ok((state, meta))
}

/// How many ranks write in the run's directory: all, if each of them can write where rank 0 does; else rank 0 alone.
pub(super) fn writers(dir: &Path, ranks: &mut dyn Collective) -> Result<usize, CollectiveError> {
    if ranks.size() == 1 {
        return Ok(1);
    }
    // No other file has its name. So another machine's directory is not taken for this one, whatever it holds.
    let own = AtomicFile::create(&dir.join("ranks")).ok();
    let name = own.as_ref().and_then(|file| file.temporary().file_name()).unwrap_or_default();
    let all = ranks.gather(name.as_encoded_bytes())?;
    let seen = own.is_some() && dir.join(&*String::from_utf8_lossy(&all[0])).is_file();
    let all = ranks.gather(&[u8::from(seen)])?;
    Ok(if all.iter().all(|said| *said == [1]) { ranks.size() } else { 1 })
}
