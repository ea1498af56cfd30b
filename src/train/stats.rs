//! Statistics of a run: JSON lines, one for each interval, and their picture.
//!
//! Every line has `nimg`, the images seen. After a restart the lines newer than the checkpoint are dropped, as is a
//! line that was cut off when the process died, so that `nimg` never decreases. Anything else that is no such line was
//! put there by someone else, and is set aside.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::formats::{free_name, input, write_atomically};
use crate::system;

/// What an interval of training looked like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Images seen.
    pub nimg: u64,
    /// Optimizer steps taken.
    pub step: u64,
    /// Mean loss per element since the last line; null in JSON if it never was a number.
    pub loss: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Mean L2 norm of the gradient since the last line.
    pub grad_norm: f64,
    /// Non-finite gradient values that were zeroed since the last line.
    pub nonfinite: u64,
    /// Training speed since the last line (or since the restart).
    pub images_per_s: f64,
    /// Time spent in training, over all restarts.
    pub seconds: f64,
    /// Peak memory of the process in MiB, where the system tells.
    pub peak_mib: Option<f64>,
}

/// Loss on the validation split.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Validation {
    /// Images seen.
    pub nimg: u64,
    /// Mean loss per element of the first moving average's weights.
    pub validation_loss: f64,
}

/// Sums since the last status line; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Images of the steps with a finite loss and gradient.
    pub images: u64,
    /// How many such steps there were.
    pub steps: u64,
    /// Their losses, per element.
    pub loss: f64,
    /// Their gradient norms.
    pub grad_norm: f64,
    /// Non-finite gradient values.
    pub nonfinite: u64,
}

/// Longest line that is read.
const MAX_LINE: u64 = 1 << 16;

/// The newest value of each number in a file of statistics, `nimg` included, and how many lines of it are none.
///
/// # Errors
/// Whatever reading reports.
pub fn latest(path: &Path) -> io::Result<(Map<String, Value>, usize)> {
    let mut reader = BufReader::new(input::open(path)?);
    let (mut latest, mut others, mut line) = (Map::new(), 0, Vec::new());
    loop {
        line.clear();
        if (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            // What was no number in the last line that has it is not known by now.
            latest.retain(|_, value| value.is_number());
            return Ok((latest, others));
        }
        let unfinished = !line.ends_with(b"\n") && str::from_utf8(&line).is_ok_and(begins_a_line);
        match serde_json::from_slice(&line) {
            Ok(Value::Object(values)) if values.contains_key("nimg") => latest.extend(values),
            _ if unfinished || line.trim_ascii().is_empty() => {}
            _ => others += 1,
        }
    }
}

/// The open file of JSON lines.
pub struct StatsFile {
    path: PathBuf,
    file: File,
}

impl StatsFile {
    /// Opens the file for appending, after dropping the lines newer than `nimg`. If there was something foreign in it,
    /// also returns where that is now.
    pub fn open(path: &Path, nimg: u64) -> io::Result<(Self, Option<PathBuf>)> {
        let mut aside = None;
        match path.symlink_metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
            Ok(about) if about.is_file() => aside = Self::clean(path, nimg)?,
            // A folder, a pipe or a link to elsewhere is not ours.
            Ok(_) => {
                let place = free_name(path, "damaged");
                fs::rename(path, &place)?;
                aside = Some(place);
            }
        }
        let file = system::no_follow(OpenOptions::new().create(true).append(true)).open(path)?;
        Ok((Self { path: path.into(), file }, aside))
    }

    /// Keeps the lines up to `nimg`. Returns where anything foreign was moved to.
    fn clean(path: &Path, nimg: u64) -> io::Result<Option<PathBuf>> {
        let mut reader = BufReader::new(File::open(path)?);
        let (mut kept, mut foreign, mut changed) = (Vec::new(), false, false);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)?;
            if length == 0 {
                break;
            }
            let whole = line.ends_with(b"\n");
            let text = std::str::from_utf8(&line).ok();
            match text.and_then(parse) {
                Some((n, _)) if n <= nimg => {
                    kept.extend_from_slice(line.trim_ascii_end());
                    kept.push(b'\n');
                    changed |= !whole;
                }
                Some(_) => changed = true,
                // The line was cut off, as it happens by a kill or a full disk.
                None if !whole && text.is_some_and(begins_a_line) || line.trim_ascii().is_empty() => changed = true,
                None => (foreign, changed) = (true, true),
            }
        }
        let aside = foreign.then(|| free_name(path, "damaged"));
        if let Some(aside) = &aside {
            fs::rename(path, aside)?;
        }
        if changed {
            write_atomically(path, |out| out.write_all(&kept))?;
        }
        Ok(aside)
    }

    /// Appends one line.
    ///
    /// # Errors
    /// Whatever writing reports.
    pub fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes())
    }

    /// Draws the losses so far into a file.
    pub fn draw(&self, picture: &Path) -> io::Result<()> {
        let text = fs::read_to_string(&self.path)?;
        let curve = |key: &str| -> Vec<(f64, f64)> {
            let points =
                text.lines().filter_map(parse).filter_map(|(n, line)| Some((n as f64, line.get(key)?.as_f64()?)));
            points.filter(|(_, value)| value.abs() < 1e30).collect()
        };
        let svg = draw(&curve("loss"), &curve("validation_loss")).map_err(io::Error::other)?;
        write_atomically(picture, |out| out.write_all(svg.as_bytes()))
    }
}

/// Whether there may have been more of it.
fn begins_a_line(text: &str) -> bool {
    let start = "{\"nimg\":";
    text.starts_with(start) || start.starts_with(text)
}

fn parse(line: &str) -> Option<(u64, Value)> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some((value.get("nimg")?.as_u64()?, value))
}

fn draw(loss: &[(f64, f64)], validation: &[(f64, f64)]) -> Result<String, PlotError> {
    let points = || loss.iter().chain(validation);
    let end = points().map(|p| p.0).fold(1.0, f64::max);
    // The first tenth falls steeply and would flatten the rest; it may leave the picture at the top.
    let late = points().filter(|p| p.0 >= end * 0.1);
    let (low, high) = late.fold((f64::MAX, f64::MIN), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let series = [("training", loss), ("validation", validation)];
    plot(("images seen", 0.0..end, &images), ("loss", low..high), &series)
}

/// Why a picture could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PlotError(#[from] DrawingAreaErrorKind<io::Error>);

/// Draws curves as SVG: the horizontal axis with its name, range, and how its numbers are written; the vertical
/// one with the range of the points; up to two named curves.
///
/// # Errors
/// [`PlotError`], of the library that draws.
pub fn plot(
    (x_name, x_range, x_label): (&str, Range<f64>, &dyn Fn(f64) -> String),
    (y_name, y_range): (&str, Range<f64>),
    series: &[(&str, &[(f64, f64)])],
) -> Result<String, PlotError> {
    let margin = (y_range.end - y_range.start).max(1e-3) * 0.1;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (800, 450)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .margin(15)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x_range, y_range.start - margin..y_range.end + margin * 3.0)?;
        chart
            .configure_mesh()
            .x_label_formatter(&|x| x_label(*x))
            .x_desc(x_name)
            .y_desc(y_name)
            .light_line_style(WHITE)
            .draw()?;
        let colors = [RGBColor(31, 119, 180), RGBColor(214, 39, 40)];
        for (&(name, points), color) in series.iter().zip(colors) {
            if !points.is_empty() {
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .border_style(BLACK.mix(0.3))
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}

/// A number of images as --duration takes it.
fn images(x: f64) -> String {
    match x {
        x if x >= 1e6 => format!("{}M", (x / 1e4).round() / 100.0),
        x if x >= 1e3 => format!("{}k", (x / 10.0).round() / 100.0),
        x => format!("{}", x.round()),
    }
}

/// Peak memory of this process in MiB, where the system tells.
pub fn peak_mib() -> Option<f64> {
    Some(system::peak_memory()? as f64 / f64::from(1 << 20))
}
