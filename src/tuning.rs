//! Tables of tiles that were measured: what is in them, where they lie, and to which cards they apply.
//!
//! A table is for one card, one driver and one set of kernels ([`MeasuredOn`]). `edm2k tune` writes it to the user's
//! cache, under a name made from these. Where there is none, one of the tables in `kernels/tuned.json` is used, if
//! somebody has measured these kernels on such a card. Otherwise the model of [`Question::cheapest`] chooses.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::backend::gpu::engine::Trial;
use crate::backend::gpu::runtime::MeasuredOn;
use crate::backend::gpu::tiles::{Product, Question, Tuned, Unfit};
use crate::formats::fingerprint::Fingerprint;
use crate::formats::{At, FileError, input, json, names, write_atomically};
use crate::real::median;
use crate::system;

/// The tables that come with the program.
const SHIPPED: &str = include_str!("../kernels/tuned.json");

/// A choice that was measured to be faster than the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenChoice {
    kernels: String,
    taps: usize,
    groups: usize,
    rows: usize,
    columns: usize,
    steps: usize,
    tile: String,
    splits: usize,
    /// Median seconds of the operation.
    seconds: f64,
    /// The same with the model's choice.
    model_seconds: f64,
}

impl WrittenChoice {
    fn question(&self) -> Result<Question, Unfit> {
        let Self { taps, groups, rows, columns, steps, .. } = *self;
        Ok(Question { kernels: self.kernels.parse()?, taps, product: Product { groups, rows, columns, steps } })
    }
}

/// The choices with which a card was measured to be the fastest.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// The card, driver and kernels that it is for.
    pub origin: MeasuredOn,
    /// When it was measured last, `YYYY-MM-DD`.
    date: String,
    choices: Vec<WrittenChoice>,
}

/// A table as it is written to a file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    card: String,
    driver: String,
    kernels: String,
    date: String,
    /// Fingerprint of all the rest. Without it, a digit that changed by accident would become a choice that nobody has
    /// measured.
    fingerprint: Fingerprint,
    choices: Vec<WrittenChoice>,
}

/// Why a table is not used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum TuningError {
    #[error("{0}")]
    File(#[from] FileError),
    #[error("{}: {what}; this table of tiles is not used, `edm2k tune` makes another", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{}: tiles measured on {found}; this is {ours}, and they are not used", path.display())]
    Foreign { path: PathBuf, found: String, ours: String },
    #[error(
        "{}: tiles measured with another driver or other kernels are not used; `edm2k tune` measures again",
        path.display()
    )]
    Old { path: PathBuf },
}

/// The lower and the upper quartile of some times.
fn quartiles(seconds: &[f64]) -> (f64, f64) {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[sorted.len() / 4], sorted[sorted.len() - 1 - sorted.len() / 4])
}

/// The least gain that is worth rounding differently for.
const LEAST_GAIN: f64 = 0.02;

/// Whether times are less than the model's by more than the noise: three quarters of them must be below three quarters
/// of the model's, and the median at least 2 % less.
pub fn beats(model: &[f64], other: &[f64]) -> bool {
    !model.is_empty()
        && !other.is_empty()
        && quartiles(other).1 < quartiles(model).0
        && median(other) <= (1.0 - LEAST_GAIN) * median(model)
}

impl Table {
    /// A table in which nothing has been measured yet.
    pub fn new(origin: MeasuredOn) -> Self {
        Self { origin, date: today(), choices: Vec::new() }
    }

    /// How many choices are not the model's.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Whether the model's choices are the fastest.
    pub fn is_empty(&self) -> bool {
        self.choices.is_empty()
    }

    /// Takes in what was found out about a product, in place of what was known of it. Returns whether a choice other
    /// than the model's is faster.
    pub fn take(&mut self, trial: &Trial) -> bool {
        self.date = today();
        let Question { kernels, taps, product: Product { groups, rows, columns, steps } } = trial.question;
        let same = |known: &WrittenChoice| known.question().is_ok_and(|question| question == trial.question);
        self.choices.retain(|known| !same(known));
        let ((model, before), (choice, after)) = (&trial.model, &trial.fastest);
        if choice == model || !beats(before, after) {
            return false;
        }
        let nanoseconds = |seconds: &[f64]| (median(seconds) / trial.count as f64 * 1e9).round() / 1e9;
        self.choices.push(WrittenChoice {
            kernels: kernels.to_string(),
            taps,
            groups,
            rows,
            columns,
            steps,
            tile: choice.tile.to_string(),
            splits: choice.splits,
            seconds: nanoseconds(after),
            model_seconds: nanoseconds(before),
        });
        true
    }

    /// The choices, in the form in which tiles are looked up.
    ///
    /// # Errors
    /// The kernels have no such tile, or no such number of parts for it.
    pub fn tuned(&self) -> Result<Tuned, Unfit> {
        let mut tuned = Tuned::default();
        self.choices.iter().try_for_each(|choice| tuned.add(choice.question()?, &choice.tile, choice.splits))?;
        Ok(tuned)
    }

    fn fingerprint(&self) -> Fingerprint {
        let MeasuredOn { card, driver, kernels } = &self.origin;
        let choices = self.choices.iter().map(|choice| json!(choice).to_string());
        Fingerprint::of([card, driver, kernels, &self.date].into_iter().cloned().chain(choices))
    }

    /// The table in a file, if the file is as it was written.
    fn of(written: Written) -> Result<Self, String> {
        let Written { card, driver, kernels, date, fingerprint, choices } = written;
        let table = Self { origin: MeasuredOn { card, driver, kernels }, date, choices };
        if table.fingerprint() != fingerprint {
            return Err(format!("its fingerprint is {}, expected {fingerprint}", table.fingerprint()));
        }
        table.tuned().map_err(|unfit| unfit.to_string())?;
        Ok(table)
    }

    /// Reads a table; none if there is no such file.
    ///
    /// # Errors
    /// The file cannot be read, or is not as it was written.
    pub fn read(path: &Path) -> Result<Option<Self>, TuningError> {
        let text = match input::text(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.at(path)?,
        };
        let written = json::read(&text).map_err(|e| e.to_string());
        let damaged = |what| TuningError::Damaged { path: path.into(), what };
        written.and_then(Self::of).map(Some).map_err(damaged)
    }

    /// Writes the table, whole or not at all, with a line for each choice.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let MeasuredOn { card, driver, kernels } = &self.origin;
        let head = json!({
            "card": card, "driver": driver, "kernels": kernels, "date": self.date, "fingerprint": self.fingerprint(),
        });
        let choices: Vec<String> = self.choices.iter().map(|choice| format!("\n    {}", json!(choice))).collect();
        let head = format!("{head:#}");
        let head = head.trim_end_matches("\n}");
        let text = format!("{head},\n  \"choices\": [{}\n  ]\n}}\n", choices.join(","));
        write_atomically(path, |to| io::Write::write_all(to, text.as_bytes())).at(path)
    }
}

/// A text as part of a file's name.
fn slug(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// The file in a directory that a table of this origin is written to.
pub fn path_in(dir: &Path, MeasuredOn { card, driver, kernels }: &MeasuredOn) -> PathBuf {
    dir.join(format!("tiles-{}-{}-{}.json", slug(card), slug(driver), slug(kernels)))
}

/// The directory of this user's tables, if the system knows one.
pub fn directory() -> Option<PathBuf> {
    system::cache().map(|cache| cache.join("edm2k"))
}

/// This user's table, in `dir`.
fn own(dir: &Path, origin: &MeasuredOn) -> Result<Option<Tuned>, TuningError> {
    let path = path_in(dir, origin);
    let Some(table) = Table::read(&path)? else {
        // A table of the same card shows that it was tuned with another driver or other kernels.
        let beginning = format!("tiles-{}-", slug(&origin.card));
        let like = |name: &String| name.starts_with(&beginning) && name.ends_with(".json");
        let old = names(dir).unwrap_or_default().into_iter().find(like);
        return old.map_or(Ok(None), |name| Err(TuningError::Old { path: dir.join(name) }));
    };
    if table.origin != *origin {
        let words =
            |MeasuredOn { card, driver, kernels }: &MeasuredOn| format!("{card}, driver {driver}, kernels {kernels}");
        return Err(TuningError::Foreign { path, found: words(&table.origin), ours: words(origin) });
    }
    table.tuned().map(Some).map_err(|unfit| TuningError::Damaged { path, what: unfit.to_string() })
}

/// A table that comes with the program, and the commit whose kernels were measured.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shipped {
    #[serde(rename = "commit")]
    _commit: String,
    table: Written,
}

/// What comes with the program.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AllShipped {
    #[serde(rename = "about")]
    _about: String,
    tables: Vec<Shipped>,
}

/// The tables that come with the program.
fn shipped(text: &str) -> Result<Vec<Table>, String> {
    let all: AllShipped = json::read(text).map_err(|e| e.to_string())?;
    all.tables.into_iter().map(|shipped| Table::of(shipped.table)).collect()
}

/// The table that comes with the program for these kernels on such a card. Its driver does not matter, nor for which
/// other cards the kernels were compiled.
fn shipped_for(text: &str, origin: &MeasuredOn) -> Option<Tuned> {
    fn compiled(of: &MeasuredOn) -> &str {
        of.kernels.split(" for ").next().unwrap_or_default()
    }
    let alike = |of: &MeasuredOn| of.card == origin.card && compiled(of) == compiled(origin);
    let tables = shipped(text).expect("a test reads them");
    tables.iter().find(|table| alike(&table.origin))?.tuned().ok()
}

/// The choices for a device: this user's, or else those that come with the program. Also returns why this user's are
/// not used, if there are some. With EDM2K_UNTUNED=1 there are none, and the model chooses.
pub fn of(origin: &MeasuredOn) -> (Option<Tuned>, Option<TuningError>) {
    match std::env::var_os("EDM2K_UNTUNED").is_some_and(|value| value == "1") {
        true => (None, None),
        false => found(directory().as_deref(), SHIPPED, origin),
    }
}

/// What choices are recognised by: with others, sums come in another order.
pub(crate) fn fingerprint(tuned: &Tuned) -> Fingerprint {
    Fingerprint::of(tuned.lines())
}

fn found(dir: Option<&Path>, with_the_program: &str, origin: &MeasuredOn) -> (Option<Tuned>, Option<TuningError>) {
    match dir.map_or(Ok(None), |dir| own(dir, origin)) {
        Ok(Some(tuned)) => (Some(tuned), None),
        other => (shipped_for(with_the_program, origin), other.err()),
    }
}

/// Today's date in UTC, `YYYY-MM-DD`.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// The date so many days after 1 January 1970.
fn date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::gpu::conv::{ConvShape, Fprop};
    use crate::backend::gpu::launch::Precision;
    use crate::backend::gpu::tables::TILED;
    use crate::backend::gpu::tiles::{Card, Chooser};
    use std::fs;
    use std::rc::Rc;

    const CARD: Card = Card::new(24, 89);

    fn origin(driver: &str) -> MeasuredOn {
        let [card, kernels] = ["A card of tests, 24 multiprocessors", "0123456789abcdef, CUDA 1.2"].map(String::from);
        MeasuredOn { card, driver: driver.into(), kernels }
    }

    /// A product of the odd size `n`, and what is tried for it.
    fn question(n: usize) -> Question {
        let shape = ConvShape { n, h: 13, w: 7, ca: 64, cb: 128, cout: 136, taps: 9 };
        Fprop::new(shape, Precision::F16.into(), CARD).unwrap().question()
    }

    /// The model's choice takes twice as long as the last candidate.
    fn trial(n: usize) -> Trial {
        let (question, count) = (question(n), 3);
        let candidates = question.candidates(CARD);
        let model = (candidates[0], vec![6e-5; 4]);
        Trial { question, count, model, fastest: (candidates[candidates.len() - 1], vec![3e-5; 4]) }
    }

    fn table(sizes: &[usize]) -> Table {
        let mut table = Table::new(origin("1.2.3"));
        sizes.iter().for_each(|&n| assert!(table.take(&trial(n))));
        table
    }

    fn chosen(tuned: Tuned, n: usize) -> crate::backend::gpu::tiles::Choice {
        Chooser { card: CARD, tuned: Some(Rc::new(tuned)) }.choose(&question(n))
    }

    #[test]
    fn what_is_written_is_read_and_chosen() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(dir.path(), &origin("1.2.3"));
        assert_eq!(Table::read(&path).unwrap(), None);
        let written = table(&[1, 3]);
        written.write(&path).unwrap();
        assert_eq!(Table::read(&path).unwrap().unwrap(), written);
        let (tuned, doubt) = found(Some(dir.path()), SHIPPED, &origin("1.2.3"));
        let tuned = tuned.unwrap();
        assert!(doubt.is_none());
        for n in [1, 3] {
            assert_eq!(chosen(tuned.clone(), n), trial(n).fastest.0);
        }
        assert_eq!(chosen(tuned, 2), question(2).cheapest(CARD), "another size is the model's");
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("\"tile\"")).count(), 2, "{text}");
        assert_eq!((text.lines().next(), text.lines().last()), (Some("{"), Some("}")));
        let empty = Table::new(origin("1.2.3"));
        empty.write(&path).unwrap();
        assert_eq!(Table::read(&path).unwrap().unwrap(), empty);
    }

    #[test]
    fn seconds_are_those_of_one_launch() {
        let table = table(&[1]);
        assert_eq!((table.choices[0].seconds, table.choices[0].model_seconds), (1e-5, 2e-5));
    }

    #[test]
    fn what_is_measured_again_replaces_what_was_known() {
        let mut table = table(&[1, 3]);
        assert!(table.take(&trial(3)));
        assert_eq!(table.len(), 2);
        // Now the model's choice is the fastest.
        let mut back = trial(3);
        back.fastest = back.model.clone();
        assert!(!table.take(&back));
        assert_eq!(table.len(), 1);
        assert_eq!(chosen(table.tuned().unwrap(), 3), question(3).cheapest(CARD));
    }

    #[test]
    fn no_byte_of_a_table_changes_without_a_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(dir.path(), &origin("1.2.3"));
        table(&[3]).write(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for flipped in [1, 4, 128] {
                let mut bytes = whole.clone();
                bytes[at] ^= flipped;
                fs::write(&path, &bytes).unwrap();
                let (tuned, doubt) = found(Some(dir.path()), SHIPPED, &origin("1.2.3"));
                match doubt {
                    Some(why) => assert!(tuned.is_none() && why.to_string().lines().count() == 1, "{why}"),
                    // Such as a blank that became another, or a letter of a hexadecimal digit.
                    None => assert_eq!(tuned, Some(table(&[3]).tuned().unwrap()), "byte {at} ^ {flipped}"),
                }
            }
            fs::write(&path, &whole[..at]).unwrap();
            let (tuned, doubt) = found(Some(dir.path()), SHIPPED, &origin("1.2.3"));
            let cut_off_nothing = at + 1 == whole.len();
            assert_eq!((tuned.is_some(), doubt.is_some()), (cut_off_nothing, !cut_off_nothing), "{at} bytes");
        }
    }

    #[test]
    fn choices_that_the_kernels_do_not_have_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        let refused = |change: &dyn Fn(&mut WrittenChoice)| {
            let mut table = table(&[3]);
            change(&mut table.choices[0]);
            table.write(&path).unwrap();
            Table::read(&path).unwrap_err().to_string()
        };
        type Change = fn(&mut WrittenChoice);
        let cases: [(Change, &str); 10] = [
            (|choice| choice.tile = "96x96".into(), "no kernels conv_fprop_f16x2_96x96"),
            (|choice| choice.tile = "flat_64x64".into(), "no kernels conv_fprop_f16x2_flat_64x64"),
            (|choice| choice.kernels = "conv_fprop_f32".into(), "no kernels conv_fprop_f32"),
            (|choice| choice.kernels = "hopper_fprop_f16x2".into(), "no kernels hopper_fprop_f16x2"),
            (|choice| choice.splits = 0, "no 0 parts of 27 steps"),
            (|choice| choice.splits = 7, "no 7 parts of 27 steps"),
            (|choice| choice.splits = 33, "no 33 parts"),
            (|choice| (choice.steps, choice.splits) = (0, 1), "no 1 parts of 0 steps"),
            (|choice| (choice.rows, choice.splits) = (usize::MAX, 2), "no 2 parts of 27 steps"),
            (|choice| (choice.kernels, choice.splits) = ("codec_conv_f16".into(), 2), "no 2 parts of 27 steps"),
        ];
        for (change, words) in cases {
            let said = refused(&change);
            assert!(said.contains(words) && said.contains("table.json"), "{said}, expected {words}");
        }
    }

    #[test]
    fn another_driver_kernels_or_card_are_said_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let look = |origin: &MeasuredOn| {
            let (tuned, doubt) = found(Some(dir.path()), SHIPPED, origin);
            (tuned.is_some(), doubt.map(|why| why.to_string()).unwrap_or_default())
        };
        assert_eq!(look(&origin("1.2.3")), (false, String::new()));
        let path = path_in(dir.path(), &origin("1.2.3"));
        table(&[3]).write(&path).unwrap();
        assert_eq!(look(&origin("1.2.3")), (true, String::new()));
        let (used, said) = look(&origin("1.2.4"));
        assert!(!used && said.contains("another driver or other kernels") && said.contains("edm2k tune"), "{said}");
        let (used, said) = look(&MeasuredOn { kernels: "f".into(), ..origin("1.2.3") });
        assert!(!used && said.contains("another driver or other kernels"), "{said}");
        // The table is of another card, and nobody has measured this one.
        let other = MeasuredOn { card: "A card of tests, 25 multiprocessors".into(), ..origin("1.2.3") };
        assert_eq!(look(&other), (false, String::new()));
        // Here a table was copied under the name of another.
        fs::copy(&path, path_in(dir.path(), &other)).unwrap();
        let (used, said) = look(&other);
        assert!(!used && said.contains("24 multiprocessors") && said.contains("25 multiprocessors"), "{said}");
        assert_eq!(found(None, SHIPPED, &origin("1.2.3")).0, None, "a system without caches");
    }

    /// A file of shipped tables with this one in it.
    fn with_the_program(table: &Table) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.json");
        table.write(&path).unwrap();
        let text = fs::read_to_string(path).unwrap();
        format!("{{\"about\": \"\", \"tables\": [{{\"commit\": \"0123abc\", \"table\": {text}}}]}}")
    }

    #[test]
    fn a_shipped_table_serves_where_nobody_tuned() {
        let dir = tempfile::tempdir().unwrap();
        let text = with_the_program(&table(&[1]));
        let look = |origin: &MeasuredOn| found(Some(dir.path()), &text, origin).0.map(|tuned| chosen(tuned, 1));
        assert_eq!(look(&origin("1.2.3")), Some(trial(1).fastest.0));
        assert_eq!(look(&origin("9.9")), Some(trial(1).fastest.0), "whichever the driver");
        let compiled = |kernels: String| MeasuredOn { kernels, ..origin("1.2.3") };
        let more = compiled(format!("{} for 80 90", origin("1.2.3").kernels));
        assert_eq!(look(&more), Some(trial(1).fastest.0), "for whichever other cards they were compiled");
        assert_eq!(look(&compiled(format!("{}1 for 90", origin("1.2.3").kernels))), None, "another compiler");
        assert_eq!(look(&MeasuredOn { kernels: "f".into(), ..origin("1.2.3") }), None);
        assert_eq!(look(&MeasuredOn { card: "f".into(), ..origin("1.2.3") }), None);
        // The user's own table says that the model is right for this size.
        Table::new(origin("1.2.3")).write(&path_in(dir.path(), &origin("1.2.3"))).unwrap();
        assert_eq!(look(&origin("1.2.3")), Some(question(1).cheapest(CARD)));
    }

    /// Every number in them was measured by somebody, on a card, on a day, with the kernels of a commit, which are the
    /// present ones.
    #[test]
    fn shipped_tables_say_where_they_are_from() {
        let all: AllShipped = serde_json::from_str(SHIPPED).unwrap();
        let said = all.tables.iter().map(|shipped| {
            let hexadecimal = shipped._commit.len() >= 7 && shipped._commit.bytes().all(|b| b.is_ascii_hexdigit());
            assert!(hexadecimal, "commit '{}'", shipped._commit);
            &shipped.table
        });
        for Written { card, driver, kernels, date, choices, .. } in said {
            assert!(!card.is_empty() && !driver.is_empty() && !choices.is_empty(), "{card}, {driver}");
            assert!(date.len() == 10 && date.starts_with("20"), "{card}: {date}");
            assert!(kernels.starts_with(TILED), "{card}: a table of kernels that are no longer these; remove it");
        }
        shipped(SHIPPED).unwrap();
    }

    #[test]
    fn what_is_faster_by_less_than_the_noise_is_not_faster() {
        let times = |seconds: f64, noise: f64| -> Vec<f64> {
            [0, 3, 1, -2, 2, -1, -3].iter().map(|&i| seconds * (1.0 + noise * f64::from(i))).collect()
        };
        assert!(beats(&times(1.0, 0.0), &times(0.97, 0.0)));
        assert!(!beats(&times(1.0, 0.0), &times(0.99, 0.0)), "one percent is not worth it");
        assert!(!beats(&times(1.0, 0.0), &times(1.0, 0.0)) && !beats(&times(1.0, 0.0), &times(1.5, 0.0)));
        assert!(beats(&times(1.0, 0.01), &times(0.9, 0.01)));
        assert!(!beats(&times(1.0, 0.05), &times(0.9, 0.05)), "their quartiles overlap");
        // A quartile is 16 % away from its median: either side's noise alone hides 10 %.
        assert!(!beats(&times(1.0, 0.08), &times(0.9, 0.0)) && !beats(&times(1.0, 0.0), &times(0.9, 0.08)));
        // One interruption in seven repeats must decide nothing.
        let [mut slow, mut fast] = [times(1.0, 0.01), times(0.9, 0.01)];
        (slow[2], fast[4]) = (50.0, 50.0);
        assert!(beats(&slow, &fast));
        assert!(beats(&[1.0], &[0.5]) && !beats(&[], &[0.5]) && !beats(&[1.0], &[]));
    }

    #[test]
    fn days_have_their_dates() {
        let known =
            [(0, "1970-01-01"), (58, "1970-02-28"), (59, "1970-03-01"), (789, "1972-02-29"), (790, "1972-03-01")];
        for (days, expected) in known.into_iter().chain([(11_016, "2000-02-29"), (20_783, "2026-11-26")]) {
            assert_eq!(date(days), expected);
        }
    }
}
