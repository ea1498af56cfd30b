//! Images made and written, and the grid of them; by several processes, each its part.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use serde_json::{Value, json};

use edm2k::collective::{Part, share};
use edm2k::formats::differences::differing_texts;
use edm2k::pictures::Picture;
use edm2k::pipeline::{Image, Kept, OutDir, PipelineError, Request, Step};

use super::{Resolved, SampleArgs};
use crate::cli::ranks::Ranks;
use crate::cli::say::{above, note, out};

/// Numbers of the images of a part. A part is made of whole batches, so that each image shares its batch with the same
/// images as in one process.
pub fn images_of(part: Part, request: &Request) -> Range<usize> {
    let (count, batch) = (request.seeds.len(), request.batch);
    let batches = share(count.div_ceil(batch) as u64, part.number, part.of);
    (batches.start as usize * batch).min(count)..(batches.end as usize * batch).min(count)
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

/// Writes images and the pictures of their steps; returns the first pictures, for a grid, which begins with those that were
/// there. Of one of several parts, `given` is what it was given.
fn write(
    made: Receiver<(Image, Vec<Picture>)>,
    out: &OutDir,
    mut given: Option<&Value>,
    mut pictures: Vec<Picture>,
) -> anyhow::Result<Vec<Picture>> {
    for (image, steps) in made {
        // What the other parts have there may be of the same other files. They are to be made anew too.
        if let Some(mut others) = given.filter(|_| out.has_another(&image)).cloned() {
            let files = others["files"].as_object_mut();
            files.into_iter().flatten().for_each(|(_, file)| *file = "perhaps another".into());
            out.note_others(&others)?;
            given = None;
        }
        out.save(&image, &steps)?;
        pictures.extend(image.picture);
        pictures.truncate(most_of_grid(&pictures));
    }
    Ok(pictures)
}

/// How many of a part's images the same work has made before it was interrupted, in whole batches, and the first pictures of
/// them, for a grid.
fn there(out: &OutDir, common: &Value, request: &Request, part: Part, kept: Kept) -> (usize, Vec<Picture>) {
    let (mut count, mut pictures) = (0, Vec::new());
    for number in images_of(part, request) {
        let about = request.about(common, number);
        if !out.has(number, kept, &about) {
            break;
        }
        if pictures.len() == count {
            let Some(picture) = out.written(number, &about) else { break };
            pictures.push(picture);
            pictures.truncate(most_of_grid(&pictures));
        }
        count += 1;
    }
    let count = count / request.batch * request.batch;
    pictures.truncate(count);
    (count, pictures)
}

/// What came of a part's images, beside their files.
struct Made {
    /// The first pictures, for a grid.
    pictures: Vec<Picture>,
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
fn make(resolved: &mut Resolved, args: &SampleArgs, out: &OutDir, ranks: &Ranks) -> anyhow::Result<Made> {
    let Resolved { pipeline, request, kept, part, given } = resolved;
    let (own, save_steps) = (images_of(*part, request), args.save_steps);
    let count = own.len();
    let (before, there) = there(out, &pipeline.parameters(request), request, *part, *kept);
    let watched = save_steps || pipeline.device().runtime().is_none();
    let steps = ((count - before).div_ceil(request.batch) * request.sampler.taken()) as u64;
    let bar = ranks.bar(steps, "{msg} {per_sec} {elapsed} (about {eta} left)");
    bar.set_message(format!("{before} of {count} images"));
    if before > 0 && ranks.first() {
        above(&bar, &format!("going on: {before} of {count} images are there"));
    }
    let terminal = std::io::stderr().is_terminal();
    let started = Instant::now();
    let steps = RefCell::new(Steps::default());
    let mut images = pipeline.images(request)?.only(own.start + before..own.end);
    if watched {
        images = images.watched(|step| {
            bar.inc(1);
            if save_steps { steps.borrow_mut().keep(step, *kept == Kept::Steps) } else { Ok(()) }
        });
    }
    let (mut latents, mut latent_steps) = (Vec::new(), Vec::new());
    let pictures = thread::scope(|scope| -> anyhow::Result<Vec<Picture>> {
        // Pictures are compressed and written while the next are made.
        let (sender, made) = sync_channel(request.batch);
        let noted = Some(&*given).filter(|_| args.part.is_some() && part.of > 1);
        let writer = scope.spawn(move || write(made, out, noted, there));
        for image in images {
            let image = image?;
            let done = image.number + 1 - own.start;
            if *kept == Kept::Latents {
                latent_steps.append(&mut steps.borrow_mut().latents.remove(&image.number).unwrap_or_default());
                latents.push(image);
            } else {
                let of_steps = steps.borrow_mut().pictures.remove(&image.number).unwrap_or_default();
                if sender.send((image, of_steps)).is_err() {
                    break; // the writer says why
                }
            }
            if done.is_multiple_of(request.batch) || done == count {
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
    Ok(Made { pictures, latents, latent_steps, seconds, rate })
}

/// Makes this part's images and writes them, and what is made of those of all parts: a grid, or the file of all latents.
pub fn draw(mut resolved: Resolved, args: &SampleArgs, out: &OutDir, ranks: &mut Ranks) -> anyhow::Result<()> {
    let Made { mut pictures, latents, latent_steps, seconds, rate } = make(&mut resolved, args, out, ranks)?;
    let Resolved { pipeline, request, kept, part, given } = &resolved;
    let mut about = pipeline.parameters(request);
    let [height, width] = pipeline.size(request);
    let shape = [height, width, pipeline.net().config.img_channels];
    let origins: Vec<_> = request.conditions.iter().map(|condition| &condition.origin).collect();
    let target = if *kept == Kept::Latents {
        about["per_condition"] = request.per_condition.into();
        about["conditions"] = json!(origins);
        let mut target = out.save_latents(&latents, &latent_steps, shape, &about)?;
        drop((latents, latent_steps));
        if part.of > 1 {
            match (RequestPart { request, about: &about, part: *part, given, out, args }).joined(ranks)? {
                Some(all) => target = all,
                None => return Ok(()),
            }
        }
        out!("The images are latents, kept as they are; --vae FILE (an SD-VAE or a TAESD) makes pictures of them.");
        target
    } else {
        if part.of > 1 {
            match (RequestPart { request, about: &about, part: *part, given, out, args }).gathered(ranks)? {
                Some(all) => pictures = all,
                None => return Ok(()),
            }
        }
        // A row for each condition if they are grouped.
        let columns = match request.per_condition {
            1 if args.interpolate.is_some() => pictures.len(),
            1 => (pictures.len() as f64).sqrt().ceil() as usize,
            per_condition => per_condition,
        };
        about["seeds"] = json!(request.seeds[..pictures.len()]);
        about["per_condition"] = request.per_condition.into();
        about["conditions"] = json!(origins);
        out.save_grid(&pictures, columns, &about)?
    };
    let [height, width] = pictures.first().map_or([height, width], |picture| [picture.height(), picture.width()]);
    let (target, device) = (target.display(), pipeline.device());
    let count = request.seeds.len();
    out!("{count} images of {width}x{height} in {seconds:.1} s ({rate:.2} it/s on {device}): {target}");
    Ok(())
}

/// How many pictures make a grid, all as large as the first.
fn most_of_grid(pictures: &[Picture]) -> usize {
    let most = pictures.first().map_or(1, |picture| GRID_BYTES / picture.rgb().len().max(1));
    most.clamp(1, GRID)
}

/// One of several parts of a request, and where its images are.
#[derive(Clone, Copy)]
struct RequestPart<'a> {
    request: &'a Request,
    /// What all images say of themselves.
    about: &'a Value,
    part: Part,
    /// What all parts must have been given alike.
    given: &'a Value,
    out: &'a OutDir,
    args: &'a SampleArgs,
}

impl RequestPart<'_> {
    /// The pictures of all parts that the grid is made of, for the process that makes it.
    fn gathered(self, ranks: &mut Ranks) -> anyhow::Result<Option<Vec<Picture>>> {
        let Self { request, about, out, .. } = self;
        let mut pictures = Vec::new();
        let mut lacking = |part: Part| -> Vec<usize> {
            let mut missing = Vec::new();
            for image in images_of(part, request) {
                match out.written(image, &request.about(about, image)) {
                    Some(picture) => pictures.push(picture),
                    None => missing.push(image),
                }
                // All are looked for, though the grid has no room for all.
                pictures.truncate(most_of_grid(&pictures));
            }
            missing
        };
        let ends = self.ends(ranks, &mut lacking)?;
        Ok(ends.then_some(pictures))
    }

    /// The file of all latents, for the process that makes it.
    fn joined(self, ranks: &mut Ranks) -> anyhow::Result<Option<PathBuf>> {
        let Self { request, about, part, out, .. } = self;
        let mut files = Vec::new();
        // A part that ended at the same moment may have joined them, this one's too; else the file is an older one.
        let is_joined = || {
            let Some(all) = out.latents(Part::WHOLE, 0..request.seeds.len(), about) else { return false };
            let own = images_of(part, request);
            out.latents(part, own.clone(), about).is_none_or(|file| out.holds(&all, own, &file).unwrap_or(false))
        };
        let mut lacking = |part: Part| -> Vec<usize> {
            let own = images_of(part, request);
            match out.latents(part, own.clone(), about) {
                Some(file) => {
                    files.push(file);
                    Vec::new()
                }
                None if is_joined() => Vec::new(),
                None => own.collect(),
            }
        };
        let ends = self.ends(ranks, &mut lacking)?;
        Ok(if ends { Some(out.join_latents(files, about)?) } else { None })
    }

    /// Whether this process finds all parts there, and so is to make of them what one process would make. That is rank
    /// 0, or whichever part finds that no part is `lacking` images or made them of something else. Otherwise it prints
    /// which parts are missing.
    fn ends(self, ranks: &mut Ranks, lacking: &mut dyn FnMut(Part) -> Vec<usize>) -> anyhow::Result<bool> {
        let Self { request, part, given, args, out, .. } = self;
        ranks.met().barrier()?;
        if !ranks.first() {
            return Ok(false);
        }
        // What a part left is of other files, under the same names; of one that left nothing, its images alone are known.
        let own = given.to_string();
        let differs = |noted: String| Some(differing_texts(&own, &noted)).filter(|differs| !differs.is_empty());
        let other = |part: Part| out.noted(part).filter(|_| args.part.is_some()).and_then(differs);
        let mut lacking = |part: Part| match other(part) {
            Some(_) => images_of(part, request).collect(),
            None => lacking(part),
        };
        let of = |number| lacking(Part { number, ..part }).into_iter().map(move |image| (number, request.seeds[image]));
        let missing: Vec<(usize, u64)> = (0..part.of).flat_map(of).collect();
        let Some(&(first, seed)) = missing.first() else {
            out.forget();
            return Ok(true);
        };
        let (dir, count) = (args.outdir.display(), missing.len());
        ensure!(
            ranks.size() == 1,
            "{dir}: {count} images are missing, the first of seed {seed}, which rank {first} made: do all ranks see this directory?"
        );
        let mut parts: Vec<_> = missing.iter().map(|&(number, _)| Part { number, ..part }).collect();
        parts.dedup();
        let named = |part: &Part| match other(*part) {
            Some(differs) => format!("{part} (of something else: {differs})"),
            None => part.to_string(),
        };
        let parts: Vec<_> = parts.iter().map(named).collect();
        let made = images_of(part, request).len();
        out!(
            "{made} images of {}: {dir}. {count} are still missing, of part {}",
            request.seeds.len(),
            parts.join(", ")
        );
        Ok(false)
    }
}
