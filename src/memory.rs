//! The memory of this machine, asked about before it is filled: a size out of a file or an option that no machine has
//! room for is an error of one line, not an abort.

/// Something needs more memory than there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} needs {} of memory at least, this machine has {}", shown(*needed), shown((*there).into()))]
pub struct TooLarge {
    /// What.
    pub what: String,
    /// Bytes that it needs.
    pub needed: u128,
    /// Bytes that there are.
    pub there: u64,
}

/// Fails if this machine has not so many bytes of main memory; where the system does not tell, nothing fails.
///
/// # Errors
/// [`TooLarge`].
pub fn check(what: impl Into<String>, needed: u128) -> Result<(), TooLarge> {
    match physical() {
        Some(there) if needed > u128::from(there) => Err(TooLarge { what: what.into(), needed, there }),
        _ => Ok(()),
    }
}

/// Bytes of main memory.
fn physical() -> Option<u64> {
    // SAFETY: asks for two numbers.
    let [pages, size] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(size).ok()?).filter(|&bytes| bytes > 0)
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
        assert!(error.starts_with("a batch needs 18.4 ZB of memory at least, this machine has "), "{error}");
    }
}
