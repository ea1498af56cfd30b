//! Zip archives for tests.

/// A zip of stored entries as Python's `zipfile` writes it; `wide` with the records of archives of more than 4 GiB.
pub fn zip(entries: &[(&str, Vec<u8>)], wide: bool) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let offset = bytes.len() as u32;
        let (size, crc) = (data.len() as u32, crc32fast::hash(data));
        let common = |out: &mut Vec<u8>, size: u32, extra: u16| {
            out.extend([20, 0, 0, 0, 0, 0, 0, 0, 33, 0]);
            [crc, size, size].iter().for_each(|x| out.extend(x.to_le_bytes()));
            out.extend((name.len() as u16).to_le_bytes());
            out.extend(extra.to_le_bytes());
        };
        bytes.extend(b"PK\x03\x04");
        // An extra field that nobody knows, as some programs align by.
        common(&mut bytes, size, 6);
        bytes.extend(name.as_bytes());
        bytes.extend([0xfe, 0xca, 2, 0, 0, 0]);
        bytes.extend(data);
        directory.extend(b"PK\x01\x02\x14\x00");
        common(&mut directory, if wide { u32::MAX } else { size }, if wide { 28 } else { 0 });
        directory.extend([0; 10]);
        directory.extend(if wide { u32::MAX } else { offset }.to_le_bytes());
        directory.extend(name.as_bytes());
        if wide {
            directory.extend([1, 0, 24, 0]);
            [size, size, offset].iter().for_each(|&x| directory.extend(u64::from(x).to_le_bytes()));
        }
    }
    let (at, count) = (bytes.len() as u64, entries.len() as u64);
    bytes.extend(&directory);
    if wide {
        let record = bytes.len() as u64;
        bytes.extend(b"PK\x06\x06");
        bytes.extend(44u64.to_le_bytes());
        bytes.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        [count, count, directory.len() as u64, at].iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        bytes.extend(b"PK\x06\x07\0\0\0\0");
        bytes.extend(record.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
    }
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    let short = if wide { u16::MAX } else { count as u16 };
    [short, short].iter().for_each(|x| bytes.extend(x.to_le_bytes()));
    bytes.extend((directory.len() as u32).to_le_bytes());
    bytes.extend(if wide { u32::MAX } else { at as u32 }.to_le_bytes());
    bytes.extend(7u16.to_le_bytes());
    bytes.extend(b"comment");
    bytes
}
