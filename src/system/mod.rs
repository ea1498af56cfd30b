//! What depends on the operating system.

use std::fs::Metadata;
use std::time::SystemTime;

/// When a file was last changed or put where it is, as far as the system knows.
pub fn changed(about: &Metadata) -> Option<SystemTime> {
    #[cfg(unix)]
    let other = {
        use std::os::unix::fs::MetadataExt;
        let (seconds, nanoseconds) = (u64::try_from(about.ctime()).ok()?, u32::try_from(about.ctime_nsec()).ok()?);
        Some(SystemTime::UNIX_EPOCH + std::time::Duration::new(seconds, nanoseconds))
    };
    #[cfg(not(unix))]
    let other = about.created().ok();
    about.modified().ok().max(other)
}
