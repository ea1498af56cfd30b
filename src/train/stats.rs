//! Statistics of a run: JSON lines, one for each interval, and their picture.
//!
//! Every line has `nimg`, the images seen. After a restart the lines newer than the checkpoint are
//! dropped, as is a line that was cut off when the process died, so that `nimg` never runs backwards.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::formats::write_atomically;

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
    /// Mean loss per element, of the first moving average.
    pub validation_loss: f64,
}

/// Sums since the last status line; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sums {
    /// Images of the steps with a finite loss and gradient.
    pub images: u64,
    /// Those steps.
    pub steps: u64,
    /// Loss, per element.
    pub loss: f64,
    /// Gradient norm.
    pub grad_norm: f64,
    /// Non-finite gradient values.
    pub nonfinite: u64,
}

/// The open file of JSON lines.
pub struct StatsFile {
    path: PathBuf,
    file: File,
}

impl StatsFile {
    /// Opens the file for appending, after dropping the lines newer than `nimg`.
    ///
    /// # Errors
    /// Whatever reading or writing reports.
    pub fn open(path: &Path, nimg: u64) -> io::Result<Self> {
        let old = match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        let keep = |line: &&str| parse(line).is_some_and(|(n, _)| n <= nimg);
        let kept: String = old.lines().filter(keep).flat_map(|line| [line, "\n"]).collect();
        if kept != old {
            write_atomically(path, |out| out.write_all(kept.as_bytes()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { path: path.into(), file })
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

    /// Draws the losses so far into `loss.svg` beside the file.
    ///
    /// # Errors
    /// Whatever reading, drawing or writing reports.
    pub fn draw(&self) -> io::Result<()> {
        let text = fs::read_to_string(&self.path)?;
        let curve = |key: &str| -> Vec<(f64, f64)> {
            text.lines().filter_map(parse).filter_map(|(n, line)| Some((n as f64, line.get(key)?.as_f64()?))).collect()
        };
        let svg = draw(&curve("loss"), &curve("validation_loss")).map_err(io::Error::other)?;
        write_atomically(&self.path.with_file_name("loss.svg"), |out| out.write_all(svg.as_bytes()))
    }
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
pub type PlotError = Box<dyn std::error::Error + Send + Sync>;

/// Draws curves as SVG: the horizontal axis with its name, range, and how its numbers are written; the vertical
/// one with the range of the points; up to two named curves.
///
/// # Errors
/// Whatever drawing reports.
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

/// Peak memory of this process in MiB, where the system tells (Linux).
pub fn peak_mib() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}
