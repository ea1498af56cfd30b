//! What is said of training runs and their checkpoints.

use std::path::Path;

use anyhow::ensure;
use serde::Serialize;
use serde_json::{Map, Value, json};

use edm2k::condition::vocabulary::Vocabulary;
use edm2k::formats::At;
use edm2k::train::checkpoint::{self, Checkpoint};
use edm2k::train::{CheckpointError, Settings, State, files, stats};

use crate::cli::say::out;

/// Whether a directory is that of a run.
pub fn is_one(dir: &Path) -> anyhow::Result<bool> {
    Ok(dir.join(files::STATS).is_file()
        || !files::snapshots(dir).at(dir)?.is_empty()
        || !checkpoint::list(dir).at(dir)?.is_empty())
}

/// A run, as its files tell.
#[derive(Serialize)]
struct Run {
    kind: &'static str,
    /// The state of the newest whole checkpoint, if there is one.
    state: Option<State>,
    checkpoints: Vec<String>,
    /// The checkpoints that cannot be resumed from, with the reason.
    damaged: Vec<String>,
    snapshots: Vec<String>,
    /// The newest value of each statistic.
    latest: Map<String, Value>,
    /// Lines in the file of statistics that are none.
    damaged_lines: usize,
}

/// Shows a run. Only the metadata of its checkpoints is read; with `check` all of them are read, and a damaged one is
/// an error.
pub fn show(dir: &Path, check: bool, json: bool) -> anyhow::Result<()> {
    let (mut state, mut damaged, mut checkpoints) = (None, Vec::new(), Vec::new());
    for path in checkpoint::list(dir).at(dir)? {
        checkpoints.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
        let whole = |checkpoint: Checkpoint| {
            if check {
                checkpoint.check(&checkpoint.network()?.1)?;
            }
            Ok(checkpoint)
        };
        match Checkpoint::open(&path).and_then(whole) {
            Ok(checkpoint) => state = state.or(Some(checkpoint.state)),
            Err(why @ CheckpointError::Damaged { .. }) => damaged.push(why.to_string()),
            Err(why) => return Err(why.into()),
        }
    }
    let path = dir.join(files::STATS);
    let (latest, damaged_lines) = if path.is_file() { stats::latest(&path).at(&path)? } else { (Map::new(), 0) };
    let snapshots = files::snapshots(dir).at(dir)?;
    let run = Run { kind: "run", state, checkpoints, damaged, snapshots, latest, damaged_lines };
    match json {
        true => out!("{}", serde_json::to_value(&run)?),
        false => run.show(check),
    }
    let (damaged, all) = (run.damaged.len(), run.checkpoints.len());
    ensure!(!check || damaged == 0, "{}: {damaged} of {all} checkpoints are damaged", dir.display());
    Ok(())
}

impl Run {
    fn show(&self, check: bool) {
        match &self.state {
            Some(state) => show_state(state),
            None => {
                let nothing = self.snapshots.is_empty() && self.damaged_lines == 0;
                let unknown = if nothing { "0" } else { "an unknown number of" };
                let images = self.latest.get("nimg").map_or(unknown.into(), Value::to_string);
                out!("trained on     {images} images, and no whole checkpoint to go on from");
            }
        }
        for (key, what) in [("loss", "loss"), ("validation_loss", "validation"), ("images_per_s", "speed")] {
            if let Some(value) = self.latest.get(key).and_then(Value::as_f64) {
                out!("{what:15}{value:.5}{}", if key == "images_per_s" { " images/s" } else { "" });
            }
        }
        if self.damaged_lines > 0 {
            let lines = if self.damaged_lines == 1 { "line is" } else { "lines are" };
            out!("damaged        {}: {} {lines} no statistics", files::STATS, self.damaged_lines);
        }
        out!("checkpoints    {}{}", self.checkpoints.len(), newest(self.checkpoints.first()));
        self.damaged.iter().for_each(|why| out!("damaged        {why}"));
        out!("snapshots      {}{}", self.snapshots.len(), newest(self.snapshots.last()));
        if check && self.damaged.is_empty() && !self.checkpoints.is_empty() {
            out!("checked        all checkpoints are whole");
        }
    }
}

fn newest(name: Option<&String>) -> String {
    name.map_or(String::new(), |name| format!(", the newest {name}"))
}

/// Shows a checkpoint; with `check` all of it is read and compared with its checksums.
pub fn show_checkpoint(path: &Path, check: bool, json: bool) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let (_, table) = checkpoint.network()?;
    if check {
        checkpoint.check(&table)?;
    }
    let state = &checkpoint.state;
    if json {
        let shown =
            json!({"kind": "checkpoint", "parameters": table.trained_values(), "state": state, "checked": check});
        out!("{shown}");
        return Ok(());
    }
    out!("parameters     {} ({:.1} M)", table.trained_values(), table.trained_values() as f64 / 1e6);
    show_state(state);
    if check {
        out!("checked        all tensors are whole");
    }
    Ok(())
}

fn show_state(state: &State) {
    let Settings { data, config, ema, init, .. } = &state.settings;
    let s = &state.settings;
    let (done, steps, hours) = (state.nimg, state.step, state.seconds / 3600.0);
    out!("trained on     {done} of {} images, {steps} steps of {} in {hours:.2} hours", s.duration, s.batch);
    if !state.computed_on.is_empty() {
        out!("computed on    {}", state.computed_on);
    }
    let widths: Vec<String> = ema.iter().map(ToString::to_string).collect();
    out!("averages       {}", if widths.is_empty() { "none".into() } else { widths.join(", ") });
    out!(
        "learning rate  {} ({}), {} at this moment",
        s.lr,
        json!(s.schedule).as_str().unwrap_or_default(),
        s.learning_rate().at(done)
    );
    let [height, width, channels] = data.shape;
    let sizes = if data.sizes.is_empty() { String::new() } else { format!("{} sizes, most ", data.sizes.len()) };
    out!("image          {sizes}{width} x {height} (width x height), {channels} channels");
    let tags = data.vocabulary != Some(Vocabulary::default().fingerprint());
    let made_of = super::made_of(&data.conditioning, tags, data.condition_dim);
    out!("data           {} images, conditions of {} values: {made_of}", data.images, data.condition_dim);
    if let Some(content) = data.content {
        out!("               {content} (fingerprint of the training split)");
    }
    if let Some(autoencoder) = &data.autoencoder {
        out!("latents are of {autoencoder}");
    }
    if let Some(init) = init {
        out!("begun from     {init}");
    }
    super::show_config(config);
}
