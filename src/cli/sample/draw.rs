//! Images made and written, and the grid of them; by several processes, each its part.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};

use edm2k::collective::Part;
use edm2k::formats::fingerprint::Fingerprint;
use edm2k::pictures::Picture;
use edm2k::pipeline::{Image, Lacking, OutDir, OutputKind, PipelineError, Request, Step};

use super::{Resolved, SampleArgs};
use crate::cli::ranks::Ranks;
use crate::cli::say::{above, note, out};

/// How many parts that are missing are named.
const NAMED: usize = 8;

/// Numbers of the images of a part. A part is made of whole batches, so that each image shares its batch with the same
/// images as in one process.
pub fn images_of(part: Part, request: &Request) -> Range<usize> {
    let (count, batch) = (request.seeds.len(), request.batch);
    let batches = part.share(count.div_ceil(batch));
    (batches.start * batch).min(count)..(batches.end * batch).min(count)
}

/// The most images of a grid. Nobody looks at a larger one.
const GRID: usize = 1024;
/// The most bytes of pictures that are kept for a grid.
const GRID_BYTES: usize = 1 << 32;

/// What a batch looked like after each step: for each image its pictures, or its latents one after the other.
#[derive(Default)]
struct Steps {
    pictures: BTreeMap<usize, Vec<Picture>>,
    latents: BTreeMap<usize, Vec<f32>>,
}

impl Steps {
    fn keep(&mut self, step: &mut Step, pictures: bool) -> Result<(), PipelineError> {
        if pictures {
            for (number, picture) in (step.first..).zip(step.pictures()?) {
                self.pictures.entry(number).or_default().push(picture);
            }
            return Ok(());
        }
        let values = step.denoised()?;
        for (number, image) in (step.first..).zip(values.chunks(values.len() / step.images)) {
            self.latents.entry(number).or_default().extend_from_slice(image);
        }
        Ok(())
    }
}

/// Writes images and the pictures of their steps; returns pictures for a grid, by their images' numbers.
fn write(made: Receiver<(Image, Vec<Picture>)>, out: &OutDir) -> anyhow::Result<BTreeMap<usize, Picture>> {
    let mut pictures = BTreeMap::new();
    for (image, steps) in made {
        out.save(&image, &steps)?;
        if let Some(picture) = image.picture.filter(|picture| image.number < most_of_grid(picture)) {
            pictures.insert(image.number, picture);
        }
    }
    Ok(pictures)
}

/// The batches of a part of which an image is not there, one after the other in one range.
fn lacking(out: &OutDir, part: Part, request: &Request) -> Vec<Range<usize>> {
    let own = images_of(part, request);
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for first in own.clone().step_by(request.batch) {
        let last = (first + request.batch).min(own.end);
        match ranges.last_mut() {
            _ if (first..last).all(|number| out.had(number)) => {}
            Some(range) if range.end == first => range.end = last,
            _ => ranges.push(first..last),
        }
    }
    ranges
}

/// What came of a part's images, beside their files.
#[derive(Default)]
struct PartResult {
    /// Pictures for a grid, by their images' numbers.
    pictures: BTreeMap<usize, Picture>,
    /// Latents, if there are no pictures.
    latents: Vec<Image>,
    /// Those of their steps.
    latent_steps: Vec<f32>,
    seconds: f64,
    /// Steps a second.
    rate: f64,
}

/// Makes this part's images, and writes their pictures. A device that runs all steps as one plan cannot show them: so steps
/// are watched where they are kept, and on the CPU, where each takes so long that people want to see it.
fn make(resolved: &mut Resolved, args: &SampleArgs, out: &OutDir, ranks: &Ranks) -> anyhow::Result<PartResult> {
    let Resolved { pipeline, request, kept, part } = resolved;
    let (own, save_steps) = (images_of(*part, request), args.save_steps);
    let (lacking, count) = (lacking(out, *part, request), own.len());
    let before = count - lacking.iter().map(Range::len).sum::<usize>();
    let watched = save_steps || pipeline.device().runtime().is_none();
    let batches = lacking.iter().map(|range| range.len().div_ceil(request.batch)).sum::<usize>();
    let bar = ranks.bar((batches * request.sampler.taken()) as u64, "{msg} {per_sec} {elapsed} (about {eta} left)");
    bar.set_message(format!("{before} of {count} images"));
    if before > 0 {
        above(&bar, &format!("{before} of {count} images are there"));
    }
    if lacking.is_empty() {
        bar.finish_and_clear();
        return Ok(PartResult::default());
    }
    let terminal = std::io::stderr().is_terminal();
    let started = Instant::now();
    let steps = RefCell::new(Steps::default());
    let mut images = pipeline.images(request)?.only(lacking);
    if watched {
        images = images.watched(|step| {
            bar.inc(1);
            if save_steps { steps.borrow_mut().keep(step, *kept == OutputKind::Steps) } else { Ok(()) }
        });
    }
    let (mut latents, mut latent_steps) = (Vec::new(), Vec::new());
    let pictures = thread::scope(|scope| -> anyhow::Result<BTreeMap<usize, Picture>> {
        // Pictures are compressed and written while the next are made.
        let (sender, made) = sync_channel(request.batch);
        let writer = scope.spawn(move || write(made, out));
        for (image, done) in images.zip(before + 1..) {
            let image = image?;
            let number = image.number;
            if *kept == OutputKind::Latents {
                latent_steps.append(&mut steps.borrow_mut().latents.remove(&number).unwrap_or_default());
                latents.push(image);
            } else {
                let of_steps = steps.borrow_mut().pictures.remove(&number).unwrap_or_default();
                if sender.send((image, of_steps)).is_err() {
                    break; // the writer says why
                }
            }
            if (number + 1 - own.start).is_multiple_of(request.batch) || number + 1 == own.end {
                if !watched {
                    bar.inc(request.sampler.taken() as u64);
                }
                bar.set_message(format!("{done} of {count} images"));
                if !terminal && ranks.first() {
                    note!("{done} of {count} images, {:.1} s", started.elapsed().as_secs_f64());
                }
            }
        }
        drop(sender);
        writer.join().unwrap_or_else(|panic| resume_unwind(panic))
    })?;
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let rate = bar.length().unwrap_or(0) as f64 / seconds;
    Ok(PartResult { pictures, latents, latent_steps, seconds, rate })
}

/// Makes this part's images and writes them, and what is made of those of all parts: a grid, or the file of all latents.
pub fn draw(mut resolved: Resolved, args: &SampleArgs, out: &OutDir, ranks: &mut Ranks) -> anyhow::Result<()> {
    let PartResult { pictures, latents, latent_steps, seconds, rate } = make(&mut resolved, args, out, ranks)?;
    let Resolved { pipeline, request, kept, part } = &resolved;
    let [height, width] = pipeline.size(request);
    let shape = [height, width, pipeline.net().config.img_channels];
    let parts = Parts { request, part: *part, out, args };
    let pictures = match kept {
        OutputKind::Latents => Vec::new(),
        _ => match parts.gathered(pictures, &pipeline.parameters(request), ranks)? {
            Some(pictures) => pictures,
            None => return Ok(()),
        },
    };
    let shown = if *kept == OutputKind::Latents { request.seeds.len() } else { pictures.len() };
    let mut about = about_several(&resolved, args, shown);
    let target = if *kept == OutputKind::Latents {
        if !out.had_latents() {
            out.save_latents(&latents, &latent_steps, shape, &about)?;
        }
        drop((latents, latent_steps));
        if part.of > 1 && !parts.joined(&about, ranks)? {
            return Ok(());
        }
        let target = out.latents_path();
        out!("The images are latents, kept as they are; --vae FILE (an SD-VAE or a TAESD) makes pictures of them.");
        target
    } else {
        // A row for each condition if they are grouped.
        let columns = match request.per_condition {
            1 if args.interpolate.is_some() => pictures.len(),
            1 => (pictures.len() as f64).sqrt().ceil() as usize,
            per_condition => per_condition,
        };
        about["seeds"] = json!(request.seeds[..pictures.len()]);
        out.save_grid(&pictures, columns, &about)?
    };
    let [height, width] = pictures.first().map_or([height, width], |picture| [picture.height(), picture.width()]);
    let (target, device) = (target.display(), pipeline.device());
    let images = format!("{} images of {width}x{height}", request.seeds.len());
    match rate > 0.0 {
        true => out!("{images} in {seconds:.1} s ({rate:.2} it/s on {device}): {target}"),
        false => out!("{images} are there: {target}"),
    }
    Ok(())
}

/// The parameters of the first images together, as a grid of them or the file of their latents carries them.
pub fn about_several(resolved: &Resolved, args: &SampleArgs, images: usize) -> Value {
    let Resolved { pipeline, request, kept, .. } = resolved;
    let mut about = pipeline.parameters(request);
    let conditions = &request.conditions[..images.div_ceil(request.per_condition).min(request.conditions.len())];
    let prints: Vec<_> = conditions.iter().map(|condition| condition.fingerprint().to_string()).collect();
    about["per_condition"] = request.per_condition.into();
    about["conditions"] = json!(conditions.iter().map(|condition| &condition.origin).collect::<Vec<_>>());
    about["hashes"]["conditions"] = json!(Fingerprint::of(prints));
    if !request.towards.is_empty() {
        about["towards"] = json!(request.towards);
    }
    if *kept == OutputKind::Latents {
        about["save_steps"] = args.save_steps.into();
    }
    about
}

/// How many pictures make a grid, all as large as this one.
fn most_of_grid(picture: &Picture) -> usize {
    (GRID_BYTES / picture.rgb().len().max(1)).clamp(1, GRID)
}

/// The parts of a request, and where its images are.
#[derive(Clone, Copy)]
struct Parts<'a> {
    request: &'a Request,
    /// That of this process.
    part: Part,
    out: &'a OutDir,
    args: &'a SampleArgs,
}

impl Parts<'_> {
    /// The pictures of all parts that the grid is made of, for the process that makes it; this one has `made` some.
    fn gathered(
        self,
        mut made: BTreeMap<usize, Picture>,
        common: &Value,
        ranks: &mut Ranks,
    ) -> anyhow::Result<Option<Vec<Picture>>> {
        let Self { request, part, out, .. } = self;
        let lacks = |number: usize| Some((number, out.has(number, &request.about(common, number)).err()?));
        let mut lacking =
            |part: Part| -> Vec<(usize, Lacking)> { images_of(part, request).filter_map(lacks).collect() };
        if part.of > 1 && !self.ends(ranks, &mut lacking)? {
            return Ok(None);
        }
        let mut pictures: Vec<Picture> = Vec::new();
        for number in 0..request.seeds.len() {
            if pictures.first().is_some_and(|first| number >= most_of_grid(first)) {
                break;
            }
            pictures.push(made.remove(&number).map_or_else(|| out.picture(number), Ok)?);
        }
        Ok(Some(pictures))
    }

    /// Makes the file of all latents, if this process is the one that does.
    fn joined(self, about: &Value, ranks: &mut Ranks) -> anyhow::Result<bool> {
        let Self { request, part, out, .. } = self;
        let mut files = Vec::new();
        // A part that ended at the same moment may have joined them, this one's too; else the file is an older one.
        let is_joined = || {
            let Ok(all) = out.latents(Part::WHOLE, 0..request.seeds.len(), about) else { return false };
            let own = images_of(part, request);
            out.latents(part, own.clone(), about).map_or(true, |file| out.holds(&all, own, &file).unwrap_or(false))
        };
        let mut lacking = |part: Part| -> Vec<(usize, Lacking)> {
            let own = images_of(part, request);
            match out.latents(part, own.clone(), about) {
                Ok(file) => files.push(file),
                // There may be more parts than batches.
                Err(_) if own.is_empty() || is_joined() => {}
                Err(why) => return own.map(|number| (number, why.clone())).collect(),
            }
            Vec::new()
        };
        let ends = self.ends(ranks, &mut lacking)?;
        if ends {
            out.join_latents(files, about)?;
        }
        Ok(ends)
    }

    /// Whether this process finds all parts there, and so is to make of them what one process would make. That is rank
    /// 0, or whichever part finds that no part is `lacking` images. Otherwise it prints which parts are missing.
    fn ends(self, ranks: &mut Ranks, lacking: &mut dyn FnMut(Part) -> Vec<(usize, Lacking)>) -> anyhow::Result<bool> {
        let Self { request, part, args, .. } = self;
        ranks.met().barrier()?;
        if !ranks.first() {
            // Whether rank 0 finds all, which says so itself.
            let complete = ranks.met().gather(&[])?[0] == [1];
            ensure!(complete, "rank 0 does not find all images: do all ranks see {}?", args.outdir.display());
            return Ok(false);
        }
        let lacking: Vec<(Part, Vec<(usize, Lacking)>)> =
            Part::all(part.of).map(|part| (part, lacking(part))).filter(|(_, images)| !images.is_empty()).collect();
        ranks.met().gather(&[u8::from(lacking.is_empty())])?;
        let Some((first, images)) = lacking.first() else { return Ok(true) };
        let (dir, count) = (args.outdir.display(), lacking.iter().map(|(_, images)| images.len()).sum::<usize>());
        ensure!(
            ranks.size() == 1,
            "{dir}: {count} images are missing, the first of seed {}, which rank {} made: do all ranks see this directory?",
            request.seeds[images[0].0],
            first.number
        );
        let differs = |(_, why): &(usize, Lacking)| match why {
            Lacking::Differs(how) => Some(how.clone()),
            Lacking::Missing => None,
        };
        let named = lacking.iter().take(NAMED).map(|(part, images)| match images.iter().find_map(differs) {
            Some(how) => format!("{part} (of something else: {how})"),
            None => part.to_string(),
        });
        let more = lacking.len().saturating_sub(NAMED);
        out!(
            "{} images of {}: {dir}. {count} are still missing, of part {}{}",
            images_of(part, request).len(),
            request.seeds.len(),
            named.collect::<Vec<_>>().join(", "),
            if more > 0 { format!(" and {more} more") } else { String::new() }
        );
        Ok(false)
    }
}
