//! Tensors as PyTorch pickles them.
//!
//! A tensor is a call of `_rebuild_tensor_v2(storage, offset, size, stride, ...)`, a parameter one of
//! `_rebuild_parameter(tensor, ...)`, and a storage `_load_from_bytes(bytes)`, where the bytes are what `torch.save`
//! writes: either five pickles (a magic number, the version 1001, the sizes of the machine's types, the storage's
//! description, the list of its key), then the number of elements (8 bytes) and the elements; or a zip of stored
//! entries, `NAME/data.pkl` with the description and `NAME/data/KEY` with the elements.
//! The description is a persistent id: `('storage', torch.HalfStorage, key, 'cpu', number of elements)`.
//!
//! A dictionary of tensors that `torch.save` wrote ([`state_dict`]) has the same two forms. There a storage is the
//! persistent id itself, and in the older format the elements of all storages stand at the end, in the order of the
//! list of keys.
//!
//! Elements stay where they are in the input until they are asked for; only those of a tensor that does not have them
//! row by row are copied.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use half::{bf16, f16};
use rawzip::{CompressionMethod, ZipArchive};

use super::pickle::{Id, Pickle, PickleError, Value, quoted};
use super::safetensors::{Content, Dtype, TensorIn};
use super::zip::Stored;

/// First pickle of the older format: 0x1950a86a20f9469cfc6c.
const MAGIC: Value = Value::Long(&[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19]);

type Result<T, E = PickleError> = std::result::Result<T, E>;

/// The storages read so far, by the offsets at which they begin. So a storage that several tensors share is read once.
pub type Storages<'a> = HashMap<usize, Elements<'a>>;

/// Type and bytes of a storage's elements.
type Elements<'a> = (ElementType, &'a [u8]);

/// The type of a storage's elements; the storage's name if tensors are not read of it.
type ElementType = Result<Dtype, &'static str>;

/// A tensor: a view of a storage.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor<'a> {
    /// Type of its elements: F16, BF16, F32, F64, I64 or I32.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
    storage: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Reads the tensor or parameter that a value of a pickle describes.
    ///
    /// # Errors
    /// If it is none, or not of floats or integers, or reaches beyond its storage, or has more elements than that, so that
    /// the memory for it is bounded by the input.
    pub fn read(pickle: &'a Pickle<'a>, id: Id, storages: &mut Storages<'a>) -> Result<Self> {
        let other = |name| pickle.error(id, format!("found a tensor of torch.{name}, expected floats or integers"));
        let tensor = Self::read_with(pickle, id, storages, &Outside::default())?.map_err(other)?;
        match tensor.bytes() <= tensor.storage.len() {
            true => Ok(tensor),
            false => Err(tensor.beyond(pickle, id)),
        }
    }

    /// As [`Tensor::read`], with storages outside of the pickle too; the name of the storage if it is of other numbers. It
    /// may have more elements than its storage.
    fn read_with(
        pickle: &'a Pickle<'a>,
        id: Id,
        storages: &mut Storages<'a>,
        outside: &Outside<'a>,
    ) -> Result<Result<Self, &'static str>> {
        let Some(&[storage, offset, shape, strides, _, _]) = view(pickle, id) else {
            return Err(pickle.unexpected(data(pickle, id), "a tensor"));
        };
        let expected = "a whole number that is not negative";
        let number = |id: Id| match pickle[id] {
            Value::Int(n) => usize::try_from(n).map_err(|_| pickle.unexpected(id, expected)),
            _ => Err(pickle.unexpected(id, expected)),
        };
        let sides = |id: Id| match &pickle[id] {
            Value::Tuple(sides) if sides.len() <= 8 => sides.iter().map(|&side| number(side)).collect::<Result<_>>(),
            _ => Err(pickle.unexpected(id, "a tuple of 8 at most")),
        };
        let (offset, shape, strides): (_, Vec<_>, Vec<_>) = (number(offset)?, sides(shape)?, sides(strides)?);
        let (dtype, storage) =
            match (pickle.call_of(storage, &[("torch.storage", "_load_from_bytes")]), &pickle[storage]) {
                (Some(&[bytes]), _) => match &pickle[bytes] {
                    Value::Bytes { offset, bytes } => match storages.get(offset) {
                        Some(&known) => known,
                        None => *storages.entry(*offset).insert_entry(read_storage(bytes, *offset)?).get(),
                    },
                    _ => return Err(pickle.unexpected(bytes, "the bytes of a storage")),
                },
                (_, &Value::Persistent(about)) => outside.find(pickle, about, storages)?,
                _ => return Err(pickle.unexpected(storage, "a storage")),
            };
        let dtype = match dtype {
            Ok(dtype) => dtype,
            Err(name) => return Ok(Err(name)),
        };
        let tensor = Self { dtype, shape, strides, offset, storage };
        if tensor.fits() { Ok(Ok(tensor)) } else { Err(tensor.beyond(pickle, id)) }
    }

    fn beyond(&self, pickle: &Pickle, id: Id) -> PickleError {
        let Tensor { shape, strides, offset, storage, dtype } = self;
        let values = storage.len() / size(*dtype);
        let view = format!("shape {shape:?}, strides {strides:?}, offset {offset}");
        pickle.error(id, format!("a tensor that is not within the {values} elements of its storage: {view}"))
    }

    /// Number of bytes of its elements.
    fn bytes(&self) -> usize {
        self.shape.iter().fold(size(self.dtype), |n, &side| n.saturating_mul(side))
    }

    /// Whether it lies within its storage.
    fn fits(&self) -> bool {
        let values = self.storage.len() / size(self.dtype);
        let Some(numel) = self.shape.iter().try_fold(1usize, |n, &side| n.checked_mul(side)) else { return false };
        let last =
            self.shape.iter().zip(&self.strides).try_fold(self.offset, |at, (&side, &stride)| {
                at.checked_add(side.saturating_sub(1).checked_mul(stride)?)
            });
        self.shape.len() == self.strides.len() && (numel == 0 || last.is_some_and(|last| last < values))
    }

    /// Its elements, row by row.
    pub fn values(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F16 => self.gather(|b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => self.gather(|b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => self.gather(|b| f64::from_le_bytes(b) as f32),
            Dtype::I64 => self.gather(|b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => self.gather(|b| i32::from_le_bytes(b) as f32),
            _ => self.gather(f32::from_le_bytes),
        }
    }

    /// The bytes of its elements, row by row. `input` is what its storage may lie in.
    fn content(&self, input: &[u8]) -> Content {
        let mut row = 1usize;
        let by_rows = self.shape.iter().zip(&self.strides).rev().all(|(&side, &stride)| {
            let next = side <= 1 || stride == row;
            row = row.saturating_mul(side);
            next
        });
        // A storage that protocol 2 spells is no part of the input.
        let storage = (self.storage.as_ptr() as usize).checked_sub(input.as_ptr() as usize);
        let storage = storage.filter(|at| at + self.storage.len() <= input.len());
        match (storage, self.dtype) {
            (Some(at), _) if by_rows && self.bytes() > 0 => {
                let from = at + self.offset * size(self.dtype);
                Content::Within(from..from + self.bytes())
            }
            (_, Dtype::F16 | Dtype::BF16) => Content::Gathered(self.gather(|b: [u8; 2]| b).into_flattened()),
            (_, Dtype::F64 | Dtype::I64) => Content::Gathered(self.gather(|b: [u8; 8]| b).into_flattened()),
            _ => Content::Gathered(self.gather(|b: [u8; 4]| b).into_flattened()),
        }
    }

    fn gather<const N: usize, T>(&self, convert: impl Fn([u8; N]) -> T) -> Vec<T> {
        let elements = self.storage.as_chunks::<N>().0;
        let mut index = vec![0; self.shape.len()];
        let mut place = self.offset;
        let next = |_| {
            let value = convert(elements[place]);
            for (at, (&side, &stride)) in index.iter_mut().zip(self.shape.iter().zip(&self.strides)).rev() {
                // The stride of a side of length 1 has no meaning, and may be any number.
                (*at, place) = (*at + 1, place.wrapping_add(stride));
                if *at < side {
                    break;
                }
                (*at, place) = (0, place.wrapping_sub(side.wrapping_mul(stride)));
            }
            value
        };
        (0..self.shape.iter().product()).map(next).collect()
    }
}

/// Bytes of an element.
fn size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Names of storages, bytes of an element, and its type, if it is one that tensors are read of. The others have their
/// places in a file, too.
const STORAGES: [(&str, usize, Option<Dtype>); 17] = [
    ("HalfStorage", 2, Some(Dtype::F16)),
    ("BFloat16Storage", 2, Some(Dtype::BF16)),
    ("FloatStorage", 4, Some(Dtype::F32)),
    ("DoubleStorage", 8, Some(Dtype::F64)),
    ("LongStorage", 8, Some(Dtype::I64)),
    ("IntStorage", 4, Some(Dtype::I32)),
    ("ShortStorage", 2, None),
    ("CharStorage", 1, None),
    ("ByteStorage", 1, None),
    ("BoolStorage", 1, None),
    ("ComplexFloatStorage", 8, None),
    ("ComplexDoubleStorage", 16, None),
    ("QInt8Storage", 1, None),
    ("QUInt8Storage", 1, None),
    ("QInt32Storage", 4, None),
    ("QUInt4x2Storage", 1, None),
    ("QUInt2x4Storage", 1, None),
];

/// What a storage says of itself.
struct Description<'a> {
    dtype: ElementType,
    width: usize,
    key: &'a str,
    numel: usize,
}

impl<'a> Description<'a> {
    fn read(pickle: &Pickle<'a>) -> Result<Self> {
        let wrong = || pickle.unexpected(pickle.root(), "the persistent id of a storage");
        let Value::Persistent(id) = pickle[pickle.root()] else { return Err(wrong()) };
        Self::of(pickle, id)
    }

    /// What a persistent id says.
    fn of(pickle: &Pickle<'a>, id: Id) -> Result<Self> {
        let expected = "('storage', type, key, place, number of elements)";
        let Value::Tuple(parts) = &pickle[id] else { return Err(pickle.unexpected(id, expected)) };
        let (kind, key, numel) = match **parts {
            [tag, kind, key, _, numel] if pickle[tag] == Value::Text("storage") => (kind, key, numel),
            [tag, kind, key, _, numel, view]
                if pickle[tag] == Value::Text("storage") && pickle[view] == Value::None =>
            {
                (kind, key, numel)
            }
            _ => return Err(pickle.unexpected(id, expected)),
        };
        let named = |(name, ..): &&(&str, usize, Option<Dtype>)| pickle.global(kind) == Some(("torch", *name));
        let known = STORAGES.iter().find(named);
        let &(name, width, dtype) = known.ok_or_else(|| pickle.unexpected(kind, "the name of a torch.Storage"))?;
        let Value::Text(key) = pickle[key] else { return Err(pickle.unexpected(key, "a key")) };
        let Value::Int(numel) = pickle[numel] else { return Err(pickle.unexpected(numel, "a number of elements")) };
        let numel = usize::try_from(numel).map_err(|_| pickle.unexpected(id, "a number of elements"))?;
        Ok(Self { dtype: dtype.ok_or(name), width, key, numel })
    }

    /// The type of its elements, if `data` has all of them, and nothing else.
    fn check(&self, data: &[u8], offset: usize) -> Result<ElementType> {
        if self.numel.checked_mul(self.width) == Some(data.len()) {
            return Ok(self.dtype);
        }
        let kind = self.dtype.map_or_else(str::to_owned, |dtype| dtype.to_string());
        let what = format!("{} bytes of data for {} elements of {kind}", data.len(), self.numel);
        Err(PickleError { offset, what })
    }
}

/// The object, the list of keys, and where the elements begin, of the older format.
fn read_legacy(bytes: &[u8], base: usize) -> Result<(Pickle<'_>, Pickle<'_>, usize)> {
    let mut at = 0;
    let mut next = || {
        if at > 0 && at == bytes.len() {
            let what = "the file ends here, expected more of what torch.save writes".into();
            return Err(PickleError { offset: base + at, what });
        }
        let pickle = Pickle::parse(&bytes[at..], base + at)?;
        at += pickle.end();
        Ok(pickle)
    };
    for (value, expected) in
        [(MAGIC, "the number that begins a PyTorch file"), (Value::Int(1001), "version 1001 of PyTorch's files")]
    {
        let pickle = next()?;
        if pickle[pickle.root()] != value {
            return Err(pickle.unexpected(pickle.root(), expected));
        }
    }
    let (machine, object, keys) = (next()?, next()?, next()?);
    let Value::Dict(facts) = &machine[machine.root()] else {
        return Err(machine.unexpected(machine.root(), "a dictionary of the machine's types"));
    };
    for &(fact, value) in facts {
        if machine[fact] == Value::Text("little_endian") && machine[value] != Value::Bool(true) {
            return Err(machine.unexpected(value, "True for little_endian"));
        }
    }
    Ok((object, keys, at))
}

/// Element type and elements of a storage that `torch.save` wrote; `base` is its offset in the file.
fn read_storage(bytes: &[u8], base: usize) -> Result<Elements<'_>> {
    if bytes.starts_with(b"PK") {
        return read_zip(bytes, base);
    }
    let (storage, keys, at) = read_legacy(bytes, base)?;
    let about = Description::read(&storage)?;
    match &keys[keys.root()] {
        Value::List(list) if matches!(**list, [key] if keys[key] == Value::Text(about.key)) => {}
        _ => return Err(keys.unexpected(keys.root(), format!("a list of the key {}", quoted(about.key)))),
    }
    let error = |what| PickleError { offset: base + at, what };
    let (numel, data) =
        bytes[at..].split_first_chunk::<8>().ok_or_else(|| error("the storage ends before its elements".into()))?;
    if usize::try_from(u64::from_le_bytes(*numel)) != Ok(about.numel) {
        return Err(error(format!("{} elements, expected {}", u64::from_le_bytes(*numel), about.numel)));
    }
    Ok((about.check(data, base + at + 8)?, data))
}

/// The entries of a zip that `torch.save` wrote, by their names within its one folder.
fn entries(bytes: &[u8], base: usize, most: usize) -> Result<HashMap<String, Stored<'_>>> {
    let error = |what: String| PickleError { offset: base, what };
    let damaged = |e: rawzip::Error| error(format!("a damaged zip: {e}"));
    let archive = ZipArchive::from_slice(bytes).map_err(damaged)?;
    let (mut entries, mut list, mut total) = (HashMap::new(), archive.entries(), 0);
    while let Some(entry) = list.next_entry().map_err(damaged)? {
        if entries.len() == most {
            return Err(error(format!("a zip of more than {most} entries, expected that of one storage")));
        }
        let path = entry.file_path();
        let path = String::from_utf8_lossy(path.as_ref());
        // It writes 0 for a checksum if it was told to compute none.
        let checksum = Some(entry.crc32()).filter(|&sum| sum != 0);
        let is_stored = entry.compression_method() == CompressionMethod::STORE;
        let stored = Stored::find(bytes, &archive, entry.wayfinder(), is_stored, checksum);
        let stored = stored.map_err(|what| error(format!("entry {} of a zip: {what}", quoted(&path))))?;
        total += stored.data.len();
        // Each is compared with its checksum once, so that takes time in proportion to the file.
        if total > bytes.len() {
            return Err(error("a zip whose entries overlap".into()));
        }
        entries.insert(path.split_once('/').map_or("", |(_, name)| name).to_owned(), stored);
    }
    Ok(entries)
}

/// The bytes of an entry, compared with its checksum, and where they are.
fn whole<'a>(entry: &Stored<'a>, name: &str, base: usize) -> Result<(&'a [u8], usize)> {
    let at = base + entry.at;
    let error = |what| PickleError { offset: at, what: format!("entry {} of a zip: {what}", quoted(name)) };
    Ok((entry.bytes().map_err(error)?, at))
}

/// The pickle `data.pkl` of a zip, if the numbers beside it are little-endian.
fn description<'a>(entries: &HashMap<String, Stored<'a>>, base: usize) -> Result<Pickle<'a>> {
    let find = |name| entries.get(name).map(|entry| whole(entry, name, base)).transpose();
    if let Some((order, offset)) = find("byteorder")?
        && order != b"little"
    {
        let what = format!("byte order {}, expected 'little'", quoted(&String::from_utf8_lossy(order)));
        return Err(PickleError { offset, what });
    }
    let missing = || PickleError { offset: base, what: "a zip without an entry 'data.pkl'".into() };
    let (description, at) = find("data.pkl")?.ok_or_else(missing)?;
    Pickle::parse(description, at)
}

fn read_zip(bytes: &[u8], base: usize) -> Result<Elements<'_>> {
    // PyTorch writes about six.
    let entries = entries(bytes, base, 16)?;
    let pickle = description(&entries, base)?;
    let about = Description::read(&pickle)?;
    let name = format!("data/{}", about.key);
    let missing = || PickleError { offset: base, what: format!("a zip without an entry {}", quoted(&name)) };
    let (data, at) = whole(entries.get(&name).ok_or_else(missing)?, &name, base)?;
    Ok((about.check(data, at)?, data))
}

/// The storages that a pickle refers to by persistent ids.
#[derive(Default)]
struct Outside<'a>(HashMap<String, Stored<'a>>);

impl<'a> Outside<'a> {
    /// The storage of a persistent id. `known` are those that were compared with their checksums.
    fn find(&self, pickle: &Pickle<'a>, id: Id, known: &mut Storages<'a>) -> Result<Elements<'a>> {
        let about = Description::of(pickle, id)?;
        let found = self.0.get(about.key).ok_or_else(|| pickle.unexpected(id, "a storage that the file has"))?;
        let dtype = about.check(found.data, found.at)?;
        if let Entry::Vacant(unknown) = known.entry(found.at) {
            whole(found, &format!("data/{}", about.key), 0)?;
            unknown.insert((dtype, found.data));
        }
        Ok((dtype, found.data))
    }
}

/// Where networks are kept in a dictionary that has more, averages of weights before the weights themselves.
const WITHIN: [&str; 8] = ["ema", "model_ema", "ema_model", "params_ema", "state_dict", "model", "net", "params"];

/// A dictionary of tensors, read.
pub struct StateDict {
    /// Its tensors.
    pub tensors: Vec<TensorIn>,
    /// What it is called, and what others the file has, if it was taken out of several.
    pub taken: Option<(String, Vec<String>)>,
}

/// The tensors of a dictionary that `torch.save` or `pickle.dump` wrote, or of one in it: the first of `ema`, `model_ema`,
/// `ema_model`, `params_ema`, `state_dict`, `model`, `net`, `params` that has one of two sides or more. Nothing in the file
/// runs; what is no tensor of floats or integers is left out.
///
/// # Errors
/// The file is damaged, or has no tensors.
pub fn state_dict(bytes: &[u8]) -> Result<StateDict> {
    let (pickle, outside) = match bytes {
        [b'P', b'K', ..] => zipped(bytes)?,
        _ => match plain(bytes)? {
            Some(pickle) => (pickle, Outside::default()),
            None => legacy(bytes)?,
        },
    };
    let outer = dictionary(&pickle, pickle.root()).ok_or_else(|| pickle.unexpected(pickle.root(), "a dictionary"))?;
    let within = |wanted: &&'static str| {
        let (_, value) = outer.iter().rfind(|(key, _)| pickle[*key] == Value::Text(wanted))?;
        let inner = dictionary(&pickle, *value)?;
        // A network has matrices. What an average keeps beside, such as how fast it follows, has none.
        inner.iter().any(|&(_, value)| is_matrix(&pickle, value)).then_some((*wanted, inner))
    };
    let mut inner = WITHIN.iter().filter_map(within);
    let (entries, taken) = match inner.next() {
        None => (outer, None),
        Some((name, entries)) => {
            let others: Vec<String> = inner.map(|(name, _)| name.into()).collect();
            (entries, (!others.is_empty()).then(|| (name.into(), others)))
        }
    };
    let (mut storages, mut tensors, mut total) = (HashMap::new(), Vec::new(), 0usize);
    for &(key, value) in entries {
        let (Value::Text(name), Some(_)) = (&pickle[key], view(&pickle, value)) else { continue };
        let Ok(tensor) = Tensor::read_with(&pickle, value, &mut storages, &outside)? else { continue };
        // Views of a storage may be larger than it, and together larger than the file.
        total = total.saturating_add(tensor.bytes());
        if total > 4 * bytes.len() {
            return Err(pickle.error(value, "tensors of four times the file's size".into()));
        }
        let content = tensor.content(bytes);
        tensors.push(((*name).to_owned(), tensor.dtype, tensor.shape, content));
    }
    if tensors.is_empty() {
        const SHOWN: usize = 8;
        let keys =
            outer.iter().filter_map(|(key, _)| if let Value::Text(key) = pickle[*key] { Some(key) } else { None });
        let mut keys: Vec<String> = keys.take(SHOWN + 1).map(quoted).collect();
        if keys.len() > SHOWN {
            keys[SHOWN] = "...".into();
        }
        let what = match keys.join(", ") {
            none if none.is_empty() => "a dictionary without names".into(),
            keys => format!("a dictionary of {keys}"),
        };
        let expected = WITHIN.join(", ");
        return Err(PickleError {
            offset: 0,
            what: format!("found {what}, expected tensors of floats or integers, or some within {expected}"),
        });
    }
    Ok(StateDict { tensors, taken })
}

/// The tensor of a parameter; anything else as it is.
fn data(pickle: &Pickle, id: Id) -> Id {
    match pickle.call_of(id, &[("torch._utils", "_rebuild_parameter")]) {
        Some(&[tensor, _, _]) => tensor,
        _ => id,
    }
}

/// What a tensor or parameter is made of: storage, offset, shape, strides and others.
fn view<'p>(pickle: &'p Pickle, id: Id) -> Option<&'p [Id]> {
    pickle.call_of(data(pickle, id), &[("torch._utils", "_rebuild_tensor_v2")])
}

/// Whether a value is a tensor of two sides or more.
fn is_matrix(pickle: &Pickle, id: Id) -> bool {
    let shape = view(pickle, id).and_then(|parts| parts.get(2));
    shape.is_some_and(|&shape| matches!(&pickle[shape], Value::Tuple(sides) if sides.len() > 1))
}

fn dictionary<'p>(pickle: &'p Pickle, id: Id) -> Option<&'p [(Id, Id)]> {
    match &pickle[id] {
        Value::Dict(items) => Some(items),
        Value::Call { items, .. } if pickle.call_of(id, &[("collections", "OrderedDict")]).is_some() => Some(items),
        _ => None,
    }
}

/// A pickle alone, which `pickle.dump` writes: its storages are calls within it. `None` for what `torch.save` writes.
fn plain(bytes: &[u8]) -> Result<Option<Pickle<'_>>> {
    let pickle = Pickle::parse(bytes, 0)?;
    if dictionary(&pickle, pickle.root()).is_none() {
        return Ok(None);
    }
    match bytes.len() - pickle.end() {
        0 => Ok(Some(pickle)),
        rest => Err(PickleError { offset: pickle.end(), what: format!("{rest} bytes after the end of the pickle") }),
    }
}

fn zipped(bytes: &[u8]) -> Result<(Pickle<'_>, Outside<'_>)> {
    let entries = entries(bytes, 0, usize::MAX)?;
    let pickle = description(&entries, 0)?;
    let storage = |(name, entry): (String, _)| Some((name.strip_prefix("data/")?.to_owned(), entry));
    Ok((pickle, Outside(entries.into_iter().filter_map(storage).collect())))
}

fn legacy(bytes: &[u8]) -> Result<(Pickle<'_>, Outside<'_>)> {
    let (pickle, keys, mut at) = read_legacy(bytes, 0)?;
    let ended = |at: usize| PickleError { offset: at, what: "the file ends before its storages' elements".into() };
    let Value::List(list) = &keys[keys.root()] else { return Err(keys.unexpected(keys.root(), "a list of keys")) };
    let mut widths = HashMap::new();
    for value in pickle.values() {
        if let Value::Persistent(id) = *value {
            let about = Description::of(&pickle, id)?;
            widths.insert(about.key, about.width);
        }
    }
    let mut outside = Outside::default();
    for &key in list {
        let Value::Text(key) = keys[key] else { return Err(keys.unexpected(key, "a key")) };
        let numel = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).ok_or_else(|| ended(at))?;
        let width = widths.get(key).copied().unwrap_or(0);
        let length = usize::try_from(u64::from_le_bytes(*numel)).ok().and_then(|numel| numel.checked_mul(width));
        let end = length.and_then(|length| (at + 8).checked_add(length)).ok_or_else(|| ended(at))?;
        let data = bytes.get(at + 8..end).ok_or_else(|| ended(at))?;
        outside.0.insert(key.to_owned(), Stored { data, at: at + 8, checksum: None });
        at = end;
    }
    Ok((pickle, outside))
}
