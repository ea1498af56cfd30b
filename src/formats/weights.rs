//! Files of weights as people have them: safetensors, and what `torch.save` and `pickle.dump` write (`.pt`, `.pth`, `.ckpt`,
//! `.bin`, `.pkl`), of which nothing runs.

use std::path::Path;

use super::mapped::Mapped;
use super::safetensors::{Result, SafeError, SafeFile};
use super::torch;
use super::{At, input};

/// Key of the metadata that says which of several dictionaries of a file the tensors are from.
pub const TAKEN: &str = "taken from";

/// Opens a file of weights; a `module.` before all names is left out.
///
/// The file must not be changed while it is open.
///
/// # Errors
/// [`SafeError`]: it is damaged, or has no tensors.
pub fn open(path: impl AsRef<Path>) -> Result<SafeFile> {
    let path = path.as_ref();
    let file = input::open(path).at(path)?;
    let mut opened = match input::head(&file).at(path)?[..] {
        // The length of a header may look as the beginning of a pickle does.
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => SafeFile::opened(path, &file)?,
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => {
            // SAFETY: that nobody changes the file meanwhile is the documented condition.
            let map = unsafe { Mapped::new(&file, path) }.at(path)?;
            let malformed = |why: super::pickle::PickleError| SafeError::Torch { path: path.into(), why: why.into() };
            let torch::StateDict { tensors, taken } = torch::state_dict(&map).map_err(malformed)?;
            let said =
                taken.map(|(taken, others)| (TAKEN.to_owned(), format!("'{taken}', not '{}'", others.join("', '"))));
            SafeFile::of(path, map, tensors, said.into_iter().collect())?
        }
        _ => SafeFile::opened(path, &file)?,
    };
    const WRAPPER: &str = "module.";
    if opened.names().next().is_some() && opened.names().all(|name| name.starts_with(WRAPPER)) {
        opened = opened.renamed(|name| name.strip_prefix(WRAPPER).map(str::to_owned));
    }
    Ok(opened)
}
