//! TensorBoard's event file: the numbers of `stats.jsonl`, for those who look at their runs there.
//!
//! A file is a sequence of records: length (u64), a checksum of that, the message, a checksum of that. A message is an
//! `Event` of TensorFlow's `event.proto`: wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5,
//! session_log = 7. A summary holds values: tag = 1, simple_value = 2 (float). A checksum is the CRC-32C, rotated and
//! shifted so that a message may hold another one.
//!
//! A run that goes on begins another file. Its session log says from which image on the older files no longer count.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::files;
use crate::formats::names;

/// The event file that this process writes.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Begins a file in a directory, of a run that has seen `nimg` images. What older files have of later ones counts no more.
    ///
    /// # Errors
    /// Whatever writing reports.
    pub fn create(dir: &Path, nimg: u64) -> io::Result<Self> {
        let older = names(dir)?.iter().any(|name| name.starts_with(files::EVENTS));
        let seconds = now().floor();
        // The reader orders files by name.
        let name = |number: u32| dir.join(format!("{}{seconds:010}.edm2k.{number}", files::EVENTS));
        let (mut number, file) = (0, File::options());
        let (path, file) = loop {
            let path = name(number);
            match file.clone().write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                opened => break (path, opened?),
            }
        };
        let mut events = Self { path, file };
        events.event(0, |event| bytes(3, b"brain.Event:2", event))?;
        if older {
            // status = 1 (START)
            events.event(nimg + 1, |event| bytes(7, &[0x08, 1], event))?;
        }
        Ok(events)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the numbers of a line of statistics, after `nimg` images.
    ///
    /// # Errors
    /// Whatever writing reports.
    pub fn write(&mut self, nimg: u64, line: &Value) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, number) in line.as_object().into_iter().flatten() {
            if let Some(number) = number.as_f64().filter(|_| tag != "nimg") {
                let mut value = Vec::new();
                bytes(1, tag.as_bytes(), &mut value);
                value.push(2 << 3 | 5);
                value.extend((number as f32).to_le_bytes());
                bytes(1, &value, &mut summary);
            }
        }
        self.event(nimg, |event| bytes(5, &summary, event))
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut message = vec![1 << 3 | 1];
        message.extend(now().to_le_bytes());
        message.push(2 << 3);
        varint(step, &mut message);
        what(&mut message);
        self.file.write_all(&record(&message))
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A message with its length and checksums.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

fn masked(data: &[u8]) -> [u8; 4] {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// CRC-32C (Castagnoli). It is computed bit by bit, as a line of statistics has only some hundred bytes.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// A number in protobuf's base 128.
fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A field of bytes: a string, or a message.
fn bytes(field: u8, value: &[u8], out: &mut Vec<u8>) {
    out.push(field << 3 | 2);
    varint(value.len() as u64, out);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnoli_s() {
        // The check value of the catalogue of CRCs, and RFC 3720, B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn a_record_is_what_tensorflow_writes() {
        let mut value = Vec::new();
        varint(300, &mut value);
        assert_eq!(value, [0xac, 2]);
        let record = record(b"abc");
        assert_eq!((record[..8].to_vec(), &record[12..15]), (vec![3, 0, 0, 0, 0, 0, 0, 0], &b"abc"[..]));
        assert_eq!(record.len(), 8 + 4 + 3 + 4);
    }
}
