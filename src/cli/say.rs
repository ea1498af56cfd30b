//! The one way to print: results to stdout ([`out!`]), the rest to stderr ([`note!`]), a line each.
//!
//! Where nothing can be printed (the disk is full, the reader has gone), the work goes on. For stderr that is ignored;
//! for stdout it is an error once the work is done. Names and texts from files cannot move the cursor or begin a line
//! of their own, as control characters are escaped, and a message on stderr is short whatever it quotes.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressStyle};

/// Most characters of a line on stderr.
const LONGEST: usize = 299;

/// Prints a line of results to stdout; as `println!`.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::say::result(format_args!($($text)*)) };
}
/// Prints a message to stderr; as `eprintln!`.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::say::message(format_args!($($text)*)) };
}
pub(crate) use {note, out};

/// The first error of stdout.
static LOST: OnceLock<io::Error> = OnceLock::new();

/// See [`out!`].
pub fn result(text: Arguments) {
    let line = escaped(&text.to_string()) + "\n";
    if let Err(why) = io::stdout().write_all(line.as_bytes()) {
        let _ = LOST.set(why);
    }
}

/// Prints lines of results, such as indented JSON.
pub fn results(text: &str) {
    text.lines().for_each(|line| result(format_args!("{line}")));
}

/// See [`note!`].
pub fn message(text: Arguments) {
    let _ = io::stderr().write_all((shortened(&escaped(&text.to_string())) + "\n").as_bytes());
}

/// A progress bar on stderr up to `total`, with what `beside` makes of indicatif's `{pos}`, `{eta}` and so on behind it.
pub fn bar(total: u64, beside: &str) -> ProgressBar {
    ProgressBar::new(total).with_style(style(beside))
}

/// See [`bar`].
pub fn style(beside: &str) -> ProgressStyle {
    ProgressStyle::with_template(&format!("{{bar:30}} {beside}")).expect("a template of this program")
}

/// Prints a message to stderr, above a progress bar if that is shown.
pub fn above(bar: &ProgressBar, text: &str) {
    bar.suspend(|| message(format_args!("{text}")));
}

/// Whether all results were printed, as far as somebody wanted to read them.
///
/// # Errors
/// The first error of stdout.
pub fn printed() -> Result<(), &'static io::Error> {
    if let Err(why) = io::stdout().flush() {
        let _ = LOST.set(why);
    }
    match LOST.get() {
        Some(why) if why.kind() != ErrorKind::BrokenPipe => Err(why),
        _ => Ok(()),
    }
}

/// Control characters, and those that change the direction or the line, as JSON escapes them.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => safe.push_str("\\n"),
            '\r' => safe.push_str("\\r"),
            '\t' => safe.push_str("\\t"),
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => escape(&mut safe, c),
            c if c.is_control() => escape(&mut safe, c),
            c => safe.push(c),
        }
    }
    safe
}

fn escape(text: &mut String, c: char) {
    text.push_str(&format!("\\u{:04x}", u32::from(c)));
}

/// The beginning and the end of a text that is too long: a message has the name at its front, and what was expected at
/// its end.
pub fn shortened(text: &str) -> String {
    let count = text.chars().count();
    if count <= LONGEST {
        return text.into();
    }
    let (head, tail) = (LONGEST * 3 / 5, LONGEST * 2 / 5 - 5);
    text.chars().take(head).chain(" ... ".chars()).chain(text.chars().skip(count - tail)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_from_a_file_moves_the_cursor() {
        assert_eq!(escaped("a\u{1b}[2J\nedm2k: ok\u{9b}\u{202e}é\t"), "a\\u001b[2J\\nedm2k: ok\\u009b\\u202eé\\t");
    }

    #[test]
    fn long_messages_keep_their_ends() {
        assert_eq!(shortened("short"), "short");
        let long = shortened(&format!("name{}end", "x".repeat(5000)));
        assert!(long.starts_with("name") && long.ends_with("end") && long.chars().count() < 300, "{long}");
    }
}
