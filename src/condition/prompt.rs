//! Prompts: tags with weights, as people write them.
//!
//! Tags are separated by commas or line ends. A text that stands in the vocabulary exactly as it is written is that
//! tag, so `:)`, `^_^` and `saber (fate)` need no care. Otherwise brackets weigh what is in them, one tag or several:
//! `(blue hair:1.3)` by 1.3, `(blue hair)` by 1.1, `[blue hair]` by 1 / 1.1. They nest, and their weights multiply. A
//! backslash takes the next character's meaning away, as in `saber \(fate\)` or `\-_-`. A tag that is unknown with
//! underscores is looked for with spaces, and the other way round. If a tag has two weights, the larger one counts.
//!
//! A condition has norm 1 whatever the weights are. They say which of its tags count more, so the weight of a single
//! tag has no effect. No weight, and no product of nested ones, may be above 10.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::unit_norm;
use super::vocabulary::{Vocabulary, VocabularyError};

/// Largest weight.
const MAX_WEIGHT: f32 = 10.0;
/// Weight of round brackets without a number.
const EMPHASIS: f32 = 1.1;

/// How deep brackets may nest: deeper than any weight needs, and few enough that all readings can be tried.
const DEEPEST: usize = 32;

/// Some tags of a vocabulary, with weights above 0: sorted by their places, each once.
///
/// ```
/// use edm2k::condition::vocabulary::Vocabulary;
/// let vocabulary = Vocabulary::most_frequent([["heart", "red"], ["heart", "^_^"]], 9)?;
/// let prompt = vocabulary.parse("^_^, (heart:1.5)")?;
/// assert_eq!(prompt.tags(), [(0, 1.5), (1, 1.0)]);
/// assert_eq!(vocabulary.text(&prompt), "(heart:1.5), ^_^");
/// assert_eq!(vocabulary.parse("haert").unwrap_err().to_string(), "unknown tag \"haert\", did you mean \"heart\"?");
/// # Ok::<(), edm2k::condition::vocabulary::VocabularyError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt(Vec<(u32, f32)>);

impl Prompt {
    /// Tags that weigh the same.
    pub fn of(tags: &[u32]) -> Self {
        Self::new(tags.iter().map(|&tag| (tag, 1.0)).collect())
    }

    fn new(mut tags: Vec<(u32, f32)>) -> Self {
        tags.sort_by(|(a, x), (b, y)| a.cmp(b).then(y.total_cmp(x)));
        tags.dedup_by_key(|(tag, _)| *tag);
        tags.retain(|(_, weight)| *weight > 0.0);
        Self(tags)
    }

    /// Places and weights.
    pub fn tags(&self) -> &[(u32, f32)] {
        &self.0
    }

    /// Places alone.
    pub fn places(&self) -> Vec<u32> {
        self.0.iter().map(|(tag, _)| *tag).collect()
    }

    /// The same prompt with other tags added at weight 1, where it does not have them already.
    #[must_use]
    pub fn with(&self, others: &[u32]) -> Self {
        let lacks = |tag: &u32| self.0.binary_search_by_key(tag, |(own, _)| *own).is_err();
        Self::new(others.iter().filter(|tag| lacks(tag)).map(|&tag| (tag, 1.0)).chain(self.0.iter().copied()).collect())
    }
}

impl Vocabulary {
    /// The tags of a text, with their weights: [`Prompt`] says how people write them.
    ///
    /// # Errors
    /// [`VocabularyError::Unknown`] for the first unknown tag, [`VocabularyError::Weight`], [`VocabularyError::Bracket`],
    /// [`VocabularyError::Deep`].
    pub fn parse(&self, text: &str) -> Result<Prompt, VocabularyError> {
        parse(self, text)
    }

    /// A text that [`Vocabulary::parse`] reads as this prompt. Places beyond the end are left out.
    pub fn text(&self, prompt: &Prompt) -> String {
        let word = |&(place, weight): &(u32, f32)| {
            let tag = self.tag(place)?;
            Some(if weight == 1.0 { tag.into() } else { format!("({tag}:{weight})") })
        };
        prompt.tags().iter().filter_map(word).collect::<Vec<String>>().join(", ")
    }

    /// The condition of a prompt: its weights over their norm; `[D]`, norm 1, or zeros for no tags.
    ///
    /// # Panics
    /// If a place is not below [`Vocabulary::len`].
    pub fn condition(&self, prompt: &Prompt) -> Vec<f32> {
        let mut condition = vec![0.0; self.len()];
        for &(place, weight) in prompt.tags() {
            condition[place as usize] = weight;
        }
        // Without tags it stays zero.
        let _ = unit_norm(&mut condition);
        condition
    }

    /// The condition of a set of tags: 1/sqrt(k) at each of the k distinct indices, 0
    /// elsewhere; `[D]`, norm 1, or zeros for no tags.
    ///
    /// # Panics
    /// If an index is not below [`Vocabulary::len`].
    pub fn multi_hot(&self, indices: &[u32]) -> Vec<f32> {
        self.condition(&Prompt::of(indices))
    }
}

/// A closing bracket at the end of a part.
struct Closing {
    bracket: char,
    /// Where the text that it closes ends.
    end: usize,
    /// For a round bracket: the number before it, and where the text before that number ends.
    number: Option<(f32, usize)>,
}

/// A reading of a part of a prompt: how many brackets it opens, its tag, how many brackets it closes, and whether the
/// innermost one of these has its number.
struct Reading<'a> {
    opens: usize,
    tag: &'a str,
    closes: usize,
    numbered: bool,
}

/// Reads a prompt.
fn parse(vocabulary: &Vocabulary, text: &str) -> Result<Prompt, VocabularyError> {
    let mut tags: Vec<(u32, f32)> = Vec::new();
    let mut open: Vec<(char, usize)> = Vec::new();
    let unbalanced = |bracket| VocabularyError::Bracket { bracket, text: text.trim().into() };
    let deep = || VocabularyError::Deep { most: DEEPEST, text: text.trim().into() };
    for part in text.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty()) {
        let closings = closings(part);
        let brackets = part.chars().take_while(|c| matches!(c, '(' | '[')).count();
        if brackets.max(closings.len()) > DEEPEST {
            return Err(deep());
        }
        let readings = readings(part, brackets, &closings);
        let known = readings.iter().find_map(|reading| {
            let closes = reading.closes <= open.len() + reading.opens;
            Some((reading, lookup(vocabulary, reading.tag).filter(|_| closes)?))
        });
        let (reading, tag) = match known {
            Some((reading, tag)) => (reading, Some(tag)),
            None => {
                if let Some(bracket) = odd(text) {
                    return Err(unbalanced(bracket));
                }
                // The reading that people probably meant: with as few brackets in the tag as possible, and no number.
                let meant = |reading: &&Reading| reading.opens == readings[readings.len() - 1].opens;
                let balanced = |tag: &str| tag.matches('(').count() == tag.matches(')').count();
                let all: Vec<&Reading> = readings.iter().filter(meant).collect();
                let first = all.iter().position(|reading| balanced(reading.tag)).unwrap_or(all.len() - 1);
                let weighed = all.get(first + 1).filter(|next| next.closes == all[first].closes);
                let reading = weighed.copied().unwrap_or(all[first]);
                let tag = unescaped(reading.tag);
                (reading, if tag.is_empty() { None } else { Some(vocabulary.index(&tag)?) })
            }
        };
        open.extend(part.chars().take(reading.opens).map(|bracket| (bracket, tags.len())));
        if open.len() > DEEPEST {
            return Err(deep());
        }
        tags.extend(tag.map(|tag| (tag, 1.0)));
        for (at, &Closing { bracket, number, .. }) in closings[..reading.closes].iter().enumerate().rev() {
            let weight = number.map(|(number, _)| number).filter(|_| reading.numbered || at + 1 < reading.closes);
            let matching = if bracket == ')' { '(' } else { '[' };
            let (_, first) = open.pop().filter(|(opened, _)| *opened == matching).ok_or(unbalanced(bracket))?;
            let weight = weight.unwrap_or(if bracket == ')' { EMPHASIS } else { 1.0 / EMPHASIS });
            let check = |weight: f32| match (0.0..=MAX_WEIGHT).contains(&weight) {
                true => Ok(()),
                false => Err(VocabularyError::Weight { weight, most: MAX_WEIGHT, part: part.into() }),
            };
            check(weight)?;
            for (_, product) in &mut tags[first..] {
                *product *= weight;
                check(*product)?;
            }
        }
    }
    match open.pop() {
        Some((bracket, _)) => Err(unbalanced(bracket)),
        None => Ok(Prompt::new(tags)),
    }
}

/// The brackets that close at the end of a part, outermost first. If there are more than [`DEEPEST`], one more than
/// that.
fn closings(part: &str) -> Vec<Closing> {
    let (mut left, mut all) = (part, Vec::new());
    while let Some(bracket @ (')' | ']')) = left.chars().last().filter(|_| all.len() <= DEEPEST && !ends_escaped(left))
    {
        left = left[..left.len() - 1].trim_end();
        let end = left.len();
        let number = left.rsplit_once(':').filter(|_| bracket == ')');
        let number = number.and_then(|(before, number)| Some((number.trim().parse().ok()?, before.trim_end().len())));
        left = &left[..number.map_or(end, |(_, before)| before)];
        all.push(Closing { bracket, end, number });
    }
    all
}

/// All readings of a part that begins with so many brackets, those with the fewest brackets first.
fn readings<'a>(part: &'a str, brackets: usize, closings: &[Closing]) -> Vec<Reading<'a>> {
    let mut all = Vec::new();
    for opens in 0..=brackets {
        // In "( )" the opening and the closing part overlap.
        let tag = |end: usize| part[opens..end.max(opens)].trim_start();
        all.push(Reading { opens, tag: tag(part.len()), closes: 0, numbered: false });
        for (closes, closing) in (1..).zip(closings) {
            all.push(Reading { opens, tag: tag(closing.end), closes, numbered: false });
            let numbered = closing.number.map(|(_, end)| Reading { opens, tag: tag(end), closes, numbered: true });
            all.extend(numbered);
        }
    }
    all
}

/// Which of the two round brackets a text has more of, if it has more of one.
fn odd(text: &str) -> Option<char> {
    let count = |bracket: char| {
        let places = text.char_indices().filter(|(_, c)| *c == bracket);
        places.filter(|(at, c)| !ends_escaped(&text[..at + c.len_utf8()])).count()
    };
    match count('(').cmp(&count(')')) {
        Ordering::Less => Some(')'),
        Ordering::Equal => None,
        Ordering::Greater => Some('('),
    }
}

/// Whether the last character follows a backslash that is not itself escaped.
fn ends_escaped(text: &str) -> bool {
    text.chars().rev().skip(1).take_while(|&c| c == '\\').count() % 2 == 1
}

fn unescaped(text: &str) -> String {
    let mut characters = text.chars();
    std::iter::from_fn(|| match characters.next()? {
        '\\' => characters.next().or(Some('\\')),
        other => Some(other),
    })
    .collect()
}

fn lookup(vocabulary: &Vocabulary, tag: &str) -> Option<u32> {
    let unescaped_tag = if tag.contains('\\') { unescaped(tag).into() } else { Cow::from(tag) };
    let with = |from: char, to: &str| {
        unescaped_tag.contains(from).then(|| vocabulary.get(&unescaped_tag.replace(from, to))).flatten()
    };
    let known = vocabulary.get(tag).or_else(|| vocabulary.get(&unescaped_tag));
    known.or_else(|| with('_', " ")).or_else(|| with(' ', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocabulary() -> Vocabulary {
        let tags =
            ["blue hair", "smile", "saber (fate)", "^_^", "-_-", ":)", "(:", r"\m/", "nier:2", "very_long", ":", "a"];
        let tag = |tag: &str| crate::condition::vocabulary::Tag { tag: tag.into(), count: 1 };
        Vocabulary::new(tags.map(tag).to_vec()).unwrap()
    }

    /// A prompt as (tag, weight), in the vocabulary's order.
    fn read(text: &str) -> Result<Vec<(String, f32)>, String> {
        let known = vocabulary();
        let prompt = known.parse(text).map_err(|error| error.to_string())?;
        Ok(prompt.tags().iter().map(|&(tag, weight)| (known.tag(tag).unwrap().into(), weight)).collect())
    }

    #[track_caller]
    fn reads(text: &str, expected: &[(&str, f32)]) {
        let expected: Vec<(String, f32)> = expected.iter().map(|&(tag, weight)| (tag.into(), weight)).collect();
        assert_eq!(read(text), Ok(expected), "{text}");
    }

    #[test]
    fn weights_are_those_that_people_write() {
        reads("blue hair, smile", &[("blue hair", 1.0), ("smile", 1.0)]);
        reads("(blue hair:1.3), smile", &[("blue hair", 1.3), ("smile", 1.0)]);
        reads("( blue hair : 1.3 )", &[("blue hair", 1.3)]);
        reads("(smile)", &[("smile", 1.1)]);
        reads("((smile))", &[("smile", 1.1 * 1.1)]);
        reads("[smile]", &[("smile", 1.0 / 1.1)]);
        reads("(blue hair, smile:2), ^_^", &[("blue hair", 2.0), ("smile", 2.0), ("^_^", 1.0)]);
        reads("((blue hair:3), smile:2)", &[("blue hair", 6.0), ("smile", 2.0)]);
        reads("(blue hair, (smile:3):2)", &[("blue hair", 2.0), ("smile", 6.0)]);
        reads("(blue hair\nsmile:2)", &[("blue hair", 2.0), ("smile", 2.0)]);
        reads("smile, (smile:2), (a:0)", &[("smile", 2.0)]);
        reads(" ,\n, ", &[]);
    }

    #[test]
    fn tags_with_brackets_colons_and_dashes_can_be_written() {
        reads("saber (fate), ^_^, -_-, :)", &[("saber (fate)", 1.0), ("^_^", 1.0), ("-_-", 1.0), (":)", 1.0)]);
        reads(r"saber \(fate\), \-_-, \:\)", &[("saber (fate)", 1.0), ("-_-", 1.0), (":)", 1.0)]);
        reads(r"(saber \(fate\):1.2)", &[("saber (fate)", 1.2)]);
        reads("(saber (fate):1.2)", &[("saber (fate)", 1.2)]);
        reads("(saber (fate))", &[("saber (fate)", 1.1)]);
        reads("((::1.2), (:):1.4)", &[(":)", 1.4), ("(:", 1.2)]);
        reads("nier:2, (nier:2), (a:2)", &[("nier:2", 1.1), ("a", 2.0)]);
        reads(r"\m/, (\m/:2)", &[(r"\m/", 2.0)]);
        reads("blue_hair, very long", &[("blue hair", 1.0), ("very_long", 1.0)]);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let wrong = |text: &str| read(text).unwrap_err();
        assert_eq!(wrong("(blu hair:1.3)"), "unknown tag \"blu hair\", did you mean \"blue hair\"?");
        assert_eq!(wrong("blue hair:1.3"), "unknown tag \"blue hair:1.3\", did you mean \"blue hair\"?");
        assert_eq!(wrong("(green (unknown):1.3)"), "unknown tag \"green (unknown)\"");
        assert_eq!(wrong("(smile"), "the bracket ( has no partner in \"(smile\"");
        assert_eq!(wrong("smile, a]"), "unknown tag \"a]\", did you mean \"a\"?");
        assert_eq!(wrong("(smile]"), "the bracket ] has no partner in \"(smile]\"");
        assert_eq!(wrong("(smile:-1)"), "weight -1 in \"(smile:-1)\", expected 0 to 10");
        assert_eq!(wrong("(smile:NaN)"), "weight NaN in \"(smile:NaN)\", expected 0 to 10");
        // What nested weights multiply to is bounded too, as a prompt's text says that.
        assert_eq!(wrong("((smile:4):4)"), "weight 16 in \"((smile:4):4)\", expected 0 to 10");
        assert_eq!(wrong("((smile:8), a:2)"), "weight 16 in \"a:2)\", expected 0 to 10");
    }

    #[test]
    fn any_number_of_brackets_is_read_at_once() {
        let many = |text: &str| text.repeat(50_000);
        for (open, close) in [("(", ")"), ("[", "]"), ("([", "])"), ("( ", " )")] {
            let (opened, closed) = (many(open), many(close));
            for text in [
                format!("{opened}smile{closed}"),
                format!("{opened}unknown{closed}"),
                format!("{opened}smile"),
                format!("smile{closed}"),
                format!("{opened}smile:1.1{}", many(":1.1)")),
                format!("({opened}smile{close}"),
                many(&format!("{open}smile,")),
                many(&format!("smile{close},")),
                many(&format!("{open}smile,")) + &many(&format!("smile{close},")),
                format!("{opened}{closed}"),
                opened.clone(),
                closed.clone(),
            ] {
                let error = read(&text).unwrap_err();
                assert!(error.chars().count() < 300, "{error}");
            }
        }
        let deep = |n: usize| format!("{}smile{}", "[".repeat(n), "]".repeat(n));
        assert_eq!(read(&deep(DEEPEST)).unwrap().len(), 1);
        assert!(read(&deep(DEEPEST + 1)).unwrap_err().starts_with("more than 32 brackets around each other in \"[["));
        // Many parts, each of which has many readings.
        let parts = many(&format!("{}smile{}, ", "(".repeat(20), ")".repeat(20)));
        assert_eq!(read(&parts[..4000 * 47]).unwrap().len(), 1);
    }

    #[test]
    fn a_prompt_is_the_same_when_its_text_is_read_again() {
        let known = vocabulary();
        let all = known.tags().len() as u32;
        for weights in [[1.0, 1.0, 1.0], [1.3, 0.5, 1.0], [1.1, 1.0 / 1.1, 9.75]] {
            let tags = (0..all).map(|tag| (tag, weights[tag as usize % 3])).collect();
            let prompt = Prompt::new(tags);
            assert_eq!(known.parse(&known.text(&prompt)).unwrap(), prompt);
        }
    }

    #[test]
    fn conditions_have_norm_1_in_the_ratio_of_the_weights() {
        let known = vocabulary();
        let condition = known.condition(&known.parse("(blue hair:3), (smile:4)").unwrap());
        assert_eq!(condition[..3], [0.6, 0.8, 0.0]);
        assert_eq!(known.condition(&Prompt::of(&[0, 5])), known.multi_hot(&[5, 0, 5]));
        assert_eq!(known.condition(&Prompt::default()), vec![0.0; known.len()]);
        // However small they are.
        for weight in ["1e-20", "1e-38", "1e-45"] {
            let prompt = known.parse(&format!("(blue hair:{weight}), (smile:{weight})")).unwrap();
            assert_eq!(known.condition(&prompt), known.multi_hot(&[0, 1]), "{weight}");
        }
    }
}
