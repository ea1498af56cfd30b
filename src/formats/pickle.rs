//! Python pickles of protocols 2 to 5, read as data: nothing that they name is imported, nothing that they call
//! is run.
//!
//! A pickle is a program for a stack machine: `\x80` version, opcodes of one byte with their arguments, `.`. Here each
//! opcode that makes something appends a [`Value`] to one list, and values refer to each other by their places in it. A
//! call, whatever it calls, is only recorded: the callee's name, its arguments, and the state and items that are given
//! to it later. So cycles and any depth of nesting are harmless, both to read and to drop.
//!
//! Cost: text and bytes are slices of the input. An opcode makes one value, one stack entry or one memo entry, and
//! there are at most [`MAX_OPCODES`]; time is linear in the input.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Index;

/// The most opcodes that are read. Snapshots of EDM2's networks have about 40,000. With this many, what is kept takes
/// less than 150 MB.
pub const MAX_OPCODES: usize = 1 << 20;

/// Why bytes are not a pickle, or not a pickle of what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}", place(*offset))]
pub struct PickleError {
    /// The offset at which it was found.
    pub offset: usize,
    /// What was found there, and what was expected.
    pub what: String,
}

/// An offset as messages mention it. What concerns the beginning needs none.
fn place(offset: usize) -> String {
    if offset == 0 { String::new() } else { format!("byte {offset}: ") }
}

type Result<T, E = PickleError> = std::result::Result<T, E>;

/// Place of a value in its [`Pickle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(u32);

/// What a pickle makes.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // the variants say it
pub enum Value<'a> {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A longer one: little-endian, two's complement.
    Long(&'a [u8]),
    /// A floating-point number.
    Float(f64),
    /// A `str`.
    Text(&'a str),
    /// A `bytes` or `bytearray`, as it lies in the input or as protocol 2 spells it, and where it begins, counted as in
    /// [`PickleError::offset`].
    Bytes { offset: usize, bytes: Cow<'a, [u8]> },
    /// A `list`.
    List(Vec<Id>),
    /// A `tuple`.
    Tuple(Vec<Id>),
    /// A `dict`: keys and values as they were set; if a key occurs twice, Python keeps the last value.
    Dict(Vec<(Id, Id)>),
    /// A `set` or `frozenset`; its members are not kept.
    Set,
    /// The name of a class or function in a module.
    Global { module: &'a str, name: &'a str },
    /// What a call would return, with the state that `__setstate__` would give it, and the items that it would be given as
    /// if it were a dictionary. List items appended to it are not kept.
    Call { callee: Id, args: Id, state: Option<Id>, items: Vec<(Id, Id)> },
    /// An object that is kept outside of the pickle, under this name.
    Persistent(Id),
}

/// A pickle, read.
#[derive(Clone, Debug)]
pub struct Pickle<'a> {
    values: Vec<(usize, Value<'a>)>,
    root: Id,
    end: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the start of `input`; `base` is added to the offsets in errors.
    ///
    /// # Errors
    /// If it is damaged, of another protocol, or longer than [`MAX_OPCODES`].
    pub fn parse(input: &'a [u8], base: usize) -> Result<Self> {
        let reader = Reader {
            input,
            base,
            at: 0,
            opcode: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            decoded: 0,
        };
        reader.run()
    }

    /// All values in it.
    pub fn values(&self) -> impl Iterator<Item = &Value<'a>> {
        self.values.iter().map(|(_, value)| value)
    }

    /// The value that it makes.
    pub fn root(&self) -> Id {
        self.root
    }

    /// Bytes of the input that it takes.
    pub fn end(&self) -> usize {
        self.end
    }

    /// An error about a value.
    pub fn error(&self, id: Id, what: String) -> PickleError {
        PickleError { offset: self.values[id.0 as usize].0, what }
    }

    /// The error for a value that is not what the caller needs.
    pub fn unexpected(&self, id: Id, expected: impl fmt::Display) -> PickleError {
        self.error(id, format!("found {}, expected {expected}", self.describe(id)))
    }

    /// Module and name of a global; `None` for anything else.
    pub fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self[id] {
            Value::Global { module, name } => Some((module, name)),
            _ => None,
        }
    }

    /// The arguments of a call, if it calls a global whose module and name are among these; `None` for anything else.
    pub fn call_of(&self, id: Id, globals: &[(&str, &str)]) -> Option<&[Id]> {
        let Value::Call { callee, args, .. } = &self[id] else { return None };
        let Value::Tuple(args) = &self[*args] else { return None };
        globals.contains(&self.global(*callee)?).then_some(args)
    }

    fn describe(&self, id: Id) -> String {
        match &self[id] {
            Value::None => "None".into(),
            Value::Bool(value) => if *value { "True" } else { "False" }.into(),
            Value::Int(value) => format!("the number {value}"),
            Value::Long(bytes) => format!("a number of {} bytes", bytes.len()),
            Value::Float(value) => format!("the number {value:?}"),
            Value::Text(text) => format!("the text {}", quoted(text)),
            Value::Bytes { bytes, .. } => format!("{} bytes", bytes.len()),
            Value::List(items) => format!("a list of {}", items.len()),
            Value::Tuple(items) => format!("a tuple of {}", items.len()),
            Value::Dict(items) => format!("a dictionary of {}", items.len()),
            Value::Set => "a set".into(),
            Value::Global { module, name } => format!("the name {}.{}", printable(module), printable(name)),
            Value::Call { callee, .. } => match self.global(*callee) {
                Some((module, name)) => {
                    format!("a call of {}.{} (which is not run)", printable(module), printable(name))
                }
                None => "a call of something that has no name".into(),
            },
            Value::Persistent(_) => "a reference to another file".into(),
        }
    }
}

impl<'a> Index<Id> for Pickle<'a> {
    type Output = Value<'a>;
    fn index(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize].1
    }
}

/// The start of a text, without what could spoil a terminal.
fn printable(text: &str) -> String {
    const SHOWN: usize = 60;
    let shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    shown + if text.chars().nth(SHOWN).is_some() { "..." } else { "" }
}

/// The same in quotes, as messages show what a pickle says.
pub fn quoted(text: &str) -> String {
    format!("'{}'", printable(text))
}

/// The stack machine.
struct Reader<'a> {
    input: &'a [u8],
    base: usize,
    /// Next byte.
    at: usize,
    /// The opcode being executed.
    opcode: usize,
    values: Vec<(usize, Value<'a>)>,
    stack: Vec<Id>,
    /// Heights of the stack where a mark is.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Bytes made of texts so far.
    decoded: usize,
}

impl<'a> Reader<'a> {
    fn run(mut self) -> Result<Pickle<'a>> {
        match self.input {
            [0x80, 2..=5, ..] => self.at = 2,
            [0x80, version, ..] => return Err(self.error(format!("protocol {version}, expected 2 to 5"))),
            [first, ..] => {
                return Err(self.error(format!("it begins with 0x{first:02x}, expected a pickle (0x80)")));
            }
            [] => return Err(self.error("it is empty, expected a pickle".into())),
        }
        for _ in 0..MAX_OPCODES {
            self.opcode = self.at;
            match self.byte()? {
                b'.' => {
                    let root = self.pop()?;
                    return Ok(Pickle { values: self.values, root, end: self.at });
                }
                opcode => self.step(opcode)?,
            }
        }
        Err(self.error(format!("more than {MAX_OPCODES} opcodes")))
    }

    /// Executes an opcode: most make a value, the others change one or the stack.
    fn step(&mut self, opcode: u8) -> Result<()> {
        let value = match opcode {
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            0x8a => self.long(Self::length8)?,
            0x8b => self.long(Self::length32)?,
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            0x8c => self.text(Self::length8)?,
            b'X' => self.text(Self::length32)?,
            0x8d => self.text(Self::length64)?,
            b'C' => self.bytes(Self::length8)?,
            b'B' => self.bytes(Self::length32)?,
            0x8e | 0x96 => self.bytes(Self::length64)?,
            // Containers.
            b')' => Value::Tuple(Vec::new()),
            b']' => Value::List(Vec::new()),
            b'}' => Value::Dict(Vec::new()),
            0x8f => Value::Set,
            0x85..=0x87 => {
                let mut items = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                items.reverse();
                Value::Tuple(items)
            }
            b't' => Value::Tuple(self.pop_mark()?),
            0x91 => {
                self.pop_mark()?;
                Value::Set
            }
            // Names and calls, which are only recorded.
            b'c' => Value::Global { module: self.line()?, name: self.line()? },
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.value(module), self.value(name)) {
                    (&Value::Text(module), &Value::Text(name)) => Value::Global { module, name },
                    _ => return Err(self.error("a global whose module or name is no text".into())),
                }
            }
            b'R' | 0x81 => {
                let (args, callee) = (self.pop()?, self.pop()?);
                match self.bytes_of(callee, args)? {
                    Some(bytes) => bytes,
                    None => Value::Call { callee, args, state: None, items: Vec::new() },
                }
            }
            0x92 => {
                let (keywords, args, callee) = (self.pop()?, self.pop()?, self.pop()?);
                // A tuple of both, not the arguments themselves, so that keywords are never overlooked.
                self.push(Value::Tuple(vec![args, keywords]));
                Value::Call { callee, args: self.pop()?, state: None, items: Vec::new() }
            }
            b'Q' => Value::Persistent(self.pop()?),
            _ => return self.change(opcode),
        };
        self.push(value);
        Ok(())
    }

    /// Executes an opcode that makes no value.
    fn change(&mut self, opcode: u8) -> Result<()> {
        match opcode {
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append(&items)
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set(&items)
            }
            0x90 => {
                self.pop_mark()?;
                let to = self.top()?;
                match self.value(to) {
                    Value::Set | Value::Call { .. } => Ok(()),
                    _ => Err(self.error("members for something that is no set".into())),
                }
            }
            b'b' => {
                let (given, to) = (self.pop()?, self.top()?);
                match &mut self.values[to.0 as usize].1 {
                    Value::Call { state, .. } => *state = Some(given),
                    _ => return Err(self.error("state for something that takes none".into())),
                }
                Ok(())
            }
            // The stack and the memo.
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b'0' if self.marks.last() == Some(&self.stack.len()) => self.pop_mark().map(drop),
            b'0' => self.pop().map(drop),
            b'1' => self.pop_mark().map(drop),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
                Ok(())
            }
            b'h' => {
                let key = self.byte()?.into();
                self.get(key)
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.get(key)
            }
            b'q' => {
                let key = self.byte()?.into();
                self.put(key)
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.put(key)
            }
            0x94 => self.put(self.memo.len() as u32),
            // A frame says how much to read ahead. Only a stream needs that.
            0x95 => {
                let (length, left) = (self.length64()?, self.input.len() - self.at);
                if length > left {
                    return Err(self.error(format!("a frame of {length} bytes, but only {left} are left")));
                }
                Ok(())
            }
            _ => Err(self.error(format!("opcode 0x{opcode:02x} is not one of those that are read"))),
        }
    }

    fn error(&self, what: String) -> PickleError {
        PickleError { offset: self.base + self.opcode, what }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let rest = &self.input[self.at..];
        let Some(bytes) = rest.get(..length) else {
            return Err(self.error(format!("{length} bytes needed, but the file ends after {}", rest.len())));
        };
        self.at += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn length8(&mut self) -> Result<usize> {
        Ok(self.byte()?.into())
    }

    fn length32(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length64(&mut self) -> Result<usize> {
        let length = u64::from_le_bytes(self.array()?);
        usize::try_from(length).map_err(|_| self.error(format!("a length of {length} bytes")))
    }

    fn str(&self, bytes: &'a [u8]) -> Result<&'a str> {
        str::from_utf8(bytes).map_err(|_| self.error("text that is not UTF-8".into()))
    }

    /// Up to the end of the line, as the text arguments of old opcodes are.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.input[self.at..];
        let length = rest.iter().position(|&b| b == b'\n').ok_or_else(|| self.error("a line without end".into()))?;
        self.at += length + 1;
        self.str(&rest[..length])
    }

    fn push(&mut self, value: Value<'a>) {
        let id = Id(self.values.len() as u32);
        self.values.push((self.base + self.opcode, value));
        self.stack.push(id);
    }

    fn long(&mut self, length: fn(&mut Self) -> Result<usize>) -> Result<Value<'a>> {
        let length = length(self)?;
        let bytes = self.take(length)?;
        Ok(match bytes.last() {
            None => Value::Int(0),
            Some(top) if length <= 8 => {
                let mut extended = if top & 0x80 == 0 { [0; 8] } else { [0xff; 8] };
                extended[..length].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(extended))
            }
            Some(_) => Value::Long(bytes),
        })
    }

    fn text(&mut self, length: fn(&mut Self) -> Result<usize>) -> Result<Value<'a>> {
        let length = length(self)?;
        let bytes = self.take(length)?;
        Ok(Value::Text(self.str(bytes)?))
    }

    fn bytes(&mut self, length: fn(&mut Self) -> Result<usize>) -> Result<Value<'a>> {
        let length = length(self)?;
        Ok(Value::Bytes { offset: self.base + self.at, bytes: self.take(length)?.into() })
    }

    /// Protocol 2 has no bytes: Python writes `_codecs.encode(text, 'latin1')`, where each character stands for a byte. None
    /// for any other call.
    fn bytes_of(&mut self, callee: Id, args: Id) -> Result<Option<Value<'a>>> {
        let (Value::Global { module: "_codecs", name: "encode" }, Value::Tuple(args)) =
            (self.value(callee), self.value(args))
        else {
            return Ok(None);
        };
        let [text, codec] = args[..] else { return Ok(None) };
        let (&Value::Text(characters), Value::Text("latin1")) = (self.value(text), self.value(codec)) else {
            return Ok(None);
        };
        // One text could be asked for many times.
        self.decoded += characters.len();
        if self.decoded > self.input.len() {
            return Err(self.error("more bytes made of texts than the input has".into()));
        }
        let bytes: Option<Vec<u8>> = characters.chars().map(|c| u8::try_from(c).ok()).collect();
        let bytes =
            bytes.ok_or_else(|| self.error("a character that is no byte, in a text that stands for bytes".into()))?;
        Ok(Some(Value::Bytes { offset: self.values[text.0 as usize].0, bytes: bytes.into() }))
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize].1
    }

    /// The top of the stack above the last mark.
    fn top(&self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.last() {
            Some(&id) if self.stack.len() > floor => Ok(id),
            _ => Err(self.error("it takes more from the stack than there is".into())),
        }
    }

    fn pop(&mut self) -> Result<Id> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    /// Takes everything above the last mark off the stack, and the mark too.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| self.error("there is no mark on the stack".into()))?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, new: &[Id]) -> Result<()> {
        let to = self.top()?;
        match &mut self.values[to.0 as usize].1 {
            Value::List(items) => items.extend_from_slice(new),
            Value::Call { .. } => {}
            _ => return Err(self.error("items for something that is no list".into())),
        }
        Ok(())
    }

    fn set(&mut self, new: &[Id]) -> Result<()> {
        let to = self.top()?;
        let (pairs, odd) = new.as_chunks::<2>();
        match &mut self.values[to.0 as usize].1 {
            Value::Dict(items) | Value::Call { items, .. } if odd.is_empty() => {
                items.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            Value::Dict(_) | Value::Call { .. } => Err(self.error("a key without a value".into())),
            _ => Err(self.error("keys for something that is no dictionary".into())),
        }
    }

    fn get(&mut self, key: u32) -> Result<()> {
        let id = self.memo.get(&key).copied().ok_or_else(|| self.error(format!("nothing is remembered as {key}")))?;
        self.stack.push(id);
        Ok(())
    }

    fn put(&mut self, key: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }
}
