//! The conditions that the arguments of `edm2k sample` ask for.

use std::io;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use edm2k::condition::classes::ANY;
use edm2k::formats::{input, json};
use edm2k::pipeline::{Condition, Pipeline};

use super::{SampleArgs, Seeds};

/// A line of --prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptLine {
    tags: Option<String>,
    negative: Option<String>,
    seed: Option<u64>,
}

/// The lines of a file of prompts that are not empty, each with the name that messages give it; `-` is standard input.
fn prompts(path: &Path) -> anyhow::Result<Vec<(String, PromptLine)>> {
    let stdin = path == Path::new("-");
    let file = if stdin { "standard input".into() } else { path.display().to_string() };
    let text = if stdin { input::text_of(io::stdin().lock()) } else { input::text(path) };
    let text = text.with_context(|| file.clone())?;
    ensure!(!text.trim().is_empty(), "{file}: it has no prompt");
    let read = |(number, line): (usize, &str)| {
        let name = format!("{file} line {number}");
        if !line.starts_with('{') {
            return Ok((name, PromptLine { tags: Some(line.into()), negative: None, seed: None }));
        }
        let mut prompt: PromptLine = json::object(line).with_context(|| name.clone())?;
        prompt.negative = prompt.negative.filter(|text| !text.trim().is_empty());
        let most = i64::MAX as u64 - u64::from(u16::MAX);
        ensure!(prompt.tags.is_some() || prompt.negative.is_some(), "{name}: neither tags nor negative ones");
        ensure!(prompt.seed.is_none_or(|seed| seed <= most), "{name}: a seed above {most}");
        Ok((name, prompt))
    };
    (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty()).map(read).collect()
}

/// The conditions that the arguments ask for, in the order of the help, with their seeds where they have some.
pub fn wanted(args: &SampleArgs, pipeline: &mut Pipeline) -> anyhow::Result<Vec<(Condition, Option<u64>)>> {
    let (mut all, seed) = (Vec::new(), args.condition_seed);
    let some = !args.tags.is_empty() || args.prompts.is_some();
    ensure!(some || !args.complete, "--complete: there are no --tags or --prompts");
    let of_tags = |pipeline: &Pipeline, text: &str| {
        if args.complete { pipeline.complete(text, seed) } else { pipeline.tags(text, seed) }
    };
    for text in &args.tags {
        all.push((of_tags(pipeline, text).context("--tags")?, None));
    }
    for (name, prompt) in args.prompts.as_deref().map(prompts).transpose().context("--prompts")?.unwrap_or_default() {
        let made = || -> anyhow::Result<Condition> {
            let condition = match &prompt.tags {
                Some(tags) => of_tags(pipeline, tags)?,
                None => pipeline.none()?,
            };
            let negative = prompt.negative.as_deref().map(|text| pipeline.tags(text, seed)).transpose()?;
            Ok(negative.iter().fold(condition, Condition::away_from))
        };
        all.push((made().with_context(|| format!("--prompts: {name}"))?, prompt.seed));
    }
    let mut others = classes(args, pipeline).context("--class")?;
    for path in &args.like {
        others.push(pipeline.like(path).context("--like")?);
    }
    for text in &args.mix {
        others.push(mix(text, seed, pipeline).with_context(|| format!("--mix {text}"))?);
    }
    for row in &args.row {
        others.push(self::row(row, pipeline).with_context(|| format!("--row {row}"))?);
    }
    if let Some(path) = &args.conditions {
        others.extend(pipeline.conditions(path).context("--conditions")?);
    }
    if let Some(count) = args.random_conditions {
        others.extend(pipeline.invent(count.into(), seed).context("--random-conditions")?);
    }
    let alone = all.is_empty() && args.row.is_empty() && args.conditions.is_none() && args.random_conditions.is_none();
    let alone = alone && args.like.is_empty() && args.mix.is_empty();
    ensure!(alone || !args.class.iter().any(|class| class == ANY), "--class: \"{ANY}\" goes alone");
    all.extend(others.into_iter().map(|condition| (condition, None)));
    if let Some(text) = args.negative.as_deref().filter(|text| !text.trim().is_empty()) {
        let negative = pipeline.tags_or_class(text, seed).context("--negative")?;
        if all.is_empty() {
            all.push((pipeline.none().context("--negative")?, None));
        }
        for (condition, _) in all.iter_mut().filter(|(condition, _)| condition.away.is_none()) {
            *condition = condition.clone().away_from(&negative);
        }
    }
    Ok(all)
}

/// The conditions of --class.
fn classes(args: &SampleArgs, pipeline: &Pipeline) -> anyhow::Result<Vec<Condition>> {
    if args.class.iter().any(|class| class == ANY) {
        let alone = args.class.len() == 1 && args.per_condition == 1 && args.interpolate.is_none();
        ensure!(alone, "\"{ANY}\" goes alone");
        let seeds = args.seeds.as_ref().map_or(vec![0], |Seeds(seeds)| seeds.clone());
        return Ok(seeds.into_iter().map(|seed| pipeline.any_class(seed)).collect::<Result<_, _>>()?);
    }
    Ok(args.class.iter().map(|text| pipeline.class(text)).collect::<Result<_, _>>()?)
}

fn row(text: &str, pipeline: &mut Pipeline) -> anyhow::Result<Condition> {
    let (dataset, id) = text.rsplit_once(':').context("expected DATASET:ID")?;
    let id = id.parse().ok().with_context(|| format!("'{id}' is not an id"))?;
    Ok(pipeline.row(dataset, id)?)
}

/// The condition of a --mix.
fn mix(text: &str, seed: u64, pipeline: &mut Pipeline) -> anyhow::Result<Condition> {
    let mut parts = Vec::new();
    for part in parts_of(text) {
        let part = part.trim();
        let (source, weight) = part.rsplit_once(':').with_context(|| format!("'{part}', expected SOURCE:WEIGHT"))?;
        let weight: f64 = weight.parse().ok().with_context(|| format!("'{weight}' is not a weight"))?;
        ensure!(weight.is_finite(), "'{weight}' is not a weight");
        let (path, number) = (Path::new(source), source.strip_prefix("random-"));
        let dataset = path.is_dir() || source.ends_with(".zip");
        let condition = match number.filter(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
            Some(number) => {
                let wrong = || format!("'{source}', expected random-0 to random-{}", u16::MAX);
                let number: u16 = number.parse().ok().with_context(wrong)?;
                pipeline.invent(usize::from(number) + 1, seed)?.swap_remove(number.into())
            }
            None if dataset => bail!("'{part}' has no weight, expected {part}:WEIGHT"),
            None if path.is_file() => pipeline.like(source)?,
            None if source.contains(':') => row(source, pipeline)?,
            None => bail!("{source}: there is no such file; tags are mixed by their weights in --tags"),
        };
        parts.push((condition, weight));
    }
    Ok(Condition::mix(&parts)?)
}

/// The parts between commas; a backslash before a comma makes it one of a name.
fn parts_of(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text;
    while let Some(at) = rest.find(',') {
        let (before, after) = (&rest[..at], &rest[at + 1..]);
        let last = parts.last_mut().expect("there is one at least");
        match before.strip_suffix('\\') {
            Some(before) => *last += &format!("{before},"),
            None => {
                *last += before;
                parts.push(String::new());
            }
        }
        rest = after;
    }
    *parts.last_mut().expect("there is one at least") += rest;
    parts
}

#[cfg(test)]
mod tests {
    use super::parts_of;

    #[test]
    fn a_comma_with_a_backslash_is_one_of_a_name() {
        assert_eq!(parts_of("a.png:1,b.png:2"), ["a.png:1", "b.png:2"]);
        assert_eq!(parts_of(r"C:\dir\a\,b\,c.png:1, d:7:-0.5"), [r"C:\dir\a,b,c.png:1", " d:7:-0.5"]);
        assert_eq!(parts_of(""), [""]);
    }
}
