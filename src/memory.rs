//! Whether this machine has the memory for something, asked before that memory is filled. So a size in a file or an
//! option for which no machine has room becomes an error of one line, not an abort.

use crate::system;

/// Something needs more memory than there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} needs {} of memory at least, {whose} {}", shown(*needed), shown((*there).into()))]
pub struct TooLarge {
    /// What needs the memory.
    pub what: String,
    /// Bytes that it needs.
    pub needed: u128,
    /// Bytes that there are.
    pub there: u64,
    /// What sets that limit, in words: this machine, or a limit on this process.
    pub whose: &'static str,
}

/// Fails if this machine does not have so many bytes of main memory, or this process may not use so many. Where the
/// system does not tell, it never fails.
pub fn check(what: impl Into<String>, needed: u128) -> Result<(), TooLarge> {
    let of = |there: Option<u64>, whose| there.map(|there| (there, whose));
    let limits = [of(system::memory(), "this machine has"), of(system::memory_limit(), "this process is limited to")];
    match limits.into_iter().flatten().min() {
        Some((there, whose)) if needed > u128::from(there) => Err(TooLarge { what: what.into(), needed, there, whose }),
        _ => Ok(()),
    }
}

fn shown(bytes: u128) -> String {
    let units = ["GB", "TB", "PB", "EB", "ZB"];
    let mut value = bytes as f64 / 1e9;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    format!("{value:.1} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_passes_and_what_fits_no_machine_does_not() {
        check("a byte", 1).unwrap();
        let error = check("a batch", u128::from(u64::MAX) * 1000).unwrap_err().to_string();
        assert!(error.starts_with("a batch needs 18.4 ZB of memory at least, "), "{error}");
    }
}
