//! What host and device share is declared once, in the kernels' files. A struct in `kernels/*.cu` and `*.cuh` that is plain
//! data, with fields and nothing else, is shared. The build script makes the Rust side of it, for
//! `src/backend/gpu/structs.rs`, with size and offsets asserted, and a C++ file that asserts the same of the declarations.
//! Also shared are constants, in lines `constexpr int NAME = NUMBER;`, and tables of instances, in lines
//! `NAME(NUMBER, ...)`. Their Rust side is for `src/backend/gpu/tables.rs`.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Size, alignment and Rust name of the types that a field may have, beside pointers and other structs.
const TYPES: &[(&str, usize, usize, &str)] = &[
    ("int", 4, 4, "i32"),
    ("int32_t", 4, 4, "i32"),
    ("unsigned", 4, 4, "u32"),
    ("uint32_t", 4, 4, "u32"),
    ("long long", 8, 8, "i64"),
    ("unsigned long long", 8, 8, "u64"),
    ("float", 4, 4, "f32"),
    ("double", 8, 8, "f64"),
    ("TensorMap", 128, 64, "TensorMap"),
];

struct Field {
    name: String,
    rust: String,
    offset: usize,
    comment: String,
}

struct Struct {
    name: String,
    file: String,
    /// The declaration, as it stands there.
    text: String,
    fields: Vec<Field>,
    size: usize,
    align: usize,
}

/// A declaration under way: what it takes so far.
struct Layout<'a> {
    known: &'a HashMap<String, (usize, usize)>,
    constants: &'a HashMap<String, usize>,
    fields: Vec<Field>,
    size: usize,
    align: usize,
}

impl Layout<'_> {
    /// Adds fields `type name, *name, name[COUNT]`.
    fn add(&mut self, declaration: &str, comment: &str) -> Result<(), String> {
        let spaced = declaration.replace('*', " * ");
        let mut base = String::new();
        for (i, part) in spaced.split(',').enumerate() {
            let (part, count) = match part.split_once('[') {
                Some((part, count)) => (part, Some(count.trim().trim_end_matches(']').trim())),
                None => (part, None),
            };
            let mut words: Vec<&str> = part.split_whitespace().filter(|&word| word != "const").collect();
            let name = words.pop().ok_or_else(|| format!("'{declaration}' names no field"))?;
            let pointer = words.contains(&"*");
            words.retain(|&word| word != "*");
            if i == 0 {
                base = words.join(" ");
            }
            let (size, align, rust) = if pointer {
                (8, 8, "DevicePtr")
            } else if let Some(&(_, size, align, rust)) = TYPES.iter().find(|known| known.0 == base) {
                (size, align, rust)
            } else if let Some(&(size, align)) = self.known.get(&base) {
                (size, align, &*base)
            } else {
                let types = TYPES.iter().map(|known| known.0).collect::<Vec<_>>().join(", ");
                return Err(format!(
                    "field {name} is of type '{base}', expected a pointer, a plain struct declared before, or {types}"
                ));
            };
            let number = |count: &str| count.parse().ok().or_else(|| self.constants.get(count).copied());
            let counted =
                count.map(|count| number(count).ok_or_else(|| format!("the size {count} of {name} is unknown")));
            let (values, rust) = match counted.transpose()? {
                Some(count) => (count, format!("[{rust}; {count}]")),
                None => (1, rust.to_owned()),
            };
            self.pad(align);
            self.fields.push(Field { name: name.into(), rust, offset: self.size, comment: comment.into() });
            self.size += values * size;
            self.align = self.align.max(align);
        }
        Ok(())
    }

    /// Makes a field of the padding that C++ leaves between fields, as no byte of a struct may be undefined.
    fn pad(&mut self, align: usize) {
        let gap = self.size.next_multiple_of(align) - self.size;
        if gap > 0 {
            let (unit, rust) =
                if gap.is_multiple_of(8) && self.size.is_multiple_of(8) { (8, "u64") } else { (1, "u8") };
            let (name, rust) = (format!("padding_{}", self.size), format!("[{rust}; {}]", gap / unit));
            self.fields.push(Field { name, rust, offset: self.size, comment: "Nothing.".into() });
            self.size += gap;
        }
    }
}

/// The structs of one file, and its integer constants.
fn read(
    path: &Path,
    text: &str,
    known: &mut HashMap<String, (usize, usize)>,
    constants: &mut HashMap<String, usize>,
) -> Result<Vec<Struct>, String> {
    let file = path.display().to_string();
    let lines: Vec<&str> = text.lines().collect();
    let mut structs = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        constants.extend(constant(line).map(|(name, value, _)| (name.to_owned(), value)));
        let Some(name) = line.strip_prefix("struct ").and_then(|rest| rest.strip_suffix(" {")) else { continue };
        let length = lines[i..].iter().position(|&line| line == "};");
        let body = &lines[i + 1..i + length.ok_or_else(|| format!("{file}:{}: no end of struct {name}", i + 1))?];
        let code = |line: &str| line.split("//").next().unwrap_or_default().trim().to_owned();
        let plain =
            |line: &&str| !code(line).contains(['(', '=', '{']) && (code(line).is_empty() || code(line).ends_with(';'));
        let template = i > 0 && lines[i - 1].starts_with("template");
        if template
            || name.contains(['<', ' ', ':'])
            || !body.iter().all(plain)
            || body.iter().any(|l| code(l).starts_with("using"))
        {
            continue;
        }
        let mut layout = Layout { known, constants, fields: Vec::new(), size: 0, align: 1 };
        for (j, line) in body.iter().enumerate() {
            let comment = line.split_once("//").map_or("", |(_, comment)| comment.trim());
            for declaration in code(line).split(';').filter(|part| !part.trim().is_empty()) {
                layout.add(declaration, comment).map_err(|e| format!("{file}:{}: struct {name}: {e}", i + j + 2))?;
            }
        }
        layout.pad(layout.align);
        let Layout { fields, size, align, .. } = layout;
        if known.insert(name.to_owned(), (size, align)).is_some() {
            return Err(format!("{file}:{}: a second struct {name}; host and device share them by their names", i + 1));
        }
        let text = lines[i..=i + body.len() + 1].join("\n");
        structs.push(Struct { name: name.into(), file: file.clone(), text, fields, size, align });
    }
    Ok(structs)
}

/// Name, numbers and comment of a line `constexpr int NAME = NUMBER;  // comment`.
fn constant(line: &str) -> Option<(&str, usize, &str)> {
    let (name, rest) = line.strip_prefix("constexpr int ")?.split_once(" = ")?;
    let (value, rest) = rest.split_once(';')?;
    Some((name, value.trim().parse().ok()?, rest.split_once("//").map_or("", |(_, comment)| comment.trim())))
}

/// Name and numbers of a line `NAME(NUMBER, ...)`.
fn instance(line: &str) -> Option<(&str, Vec<usize>)> {
    let (name, numbers) = line.trim_end().strip_suffix(')')?.split_once('(')?;
    let macro_like = !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    let numbers = numbers.split(',').map(|number| number.trim().parse().ok()).collect::<Option<_>>()?;
    macro_like.then_some((name, numbers))
}

/// The constants and the tables of one file, as a module of its name; nothing if it has none.
fn tables(path: &Path, text: &str) -> Result<String, String> {
    let mut items = String::new();
    for (name, value, comment) in text.lines().filter_map(constant).filter(|(name, ..)| *name == name.to_uppercase()) {
        items += &format!("    /// {}\n    pub const {name}: usize = {value};\n", documented(comment, name));
    }
    let mut tables: Vec<(&str, Vec<Vec<usize>>)> = Vec::new();
    for (name, numbers) in text.lines().filter_map(instance) {
        match tables.iter_mut().find(|(known, _)| *known == name) {
            Some((_, lines)) if lines[0].len() != numbers.len() => {
                return Err(format!(
                    "{}: {name}{numbers:?}: other lines have {} numbers",
                    path.display(),
                    lines[0].len()
                ));
            }
            Some((_, lines)) => lines.push(numbers),
            None => tables.push((name, vec![numbers])),
        }
    }
    for (name, lines) in tables {
        let [width, count] = [lines[0].len(), lines.len()];
        items +=
            &format!("    /// The lines `{name}`.\n    pub const {name}: [[usize; {width}]; {count}] = {lines:?};\n");
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let module = || format!("/// Of `{}`.\npub mod {name} {{\n{items}}}\n", path.display());
    Ok(if items.is_empty() { items } else { module() })
}

/// A comment as documentation, in which brackets make no links and angles no HTML.
fn documented(comment: &str, name: &str) -> String {
    let text = if comment.is_empty() { name } else { comment };
    text.chars().fold(String::new(), |mut text, c| {
        if "[]<>*_`\\".contains(c) {
            text.push('\\');
        }
        text.push(c);
        text
    })
}

/// Adds a file and those that it includes with quotes.
pub fn add_file(path: PathBuf, files: &mut BTreeMap<PathBuf, String>) -> Result<(), String> {
    if files.contains_key(&path) {
        return Ok(());
    }
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let included = |line: &str| Some(line.trim().strip_prefix("#include \"")?.split('"').next()?.to_owned());
    let headers: Vec<_> = text.lines().filter_map(included).map(|name| path.with_file_name(name)).collect();
    files.insert(path, text);
    headers.into_iter().try_for_each(|header| add_file(header, files))
}

/// A digest of texts that is the same with every compiler of Rust (FNV-1a).
pub fn digest<'a>(texts: impl IntoIterator<Item = &'a String>) -> u64 {
    // Each text ends with 0xff, which does not occur in UTF-8.
    let bytes = texts.into_iter().flat_map(|text| text.bytes().chain([0xff]));
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.fold(0xcbf2_9ce4_8422_2325, step)
}

/// The digest of the code of the kernels that have tiles, and of all that they include.
fn digest_of_tiled(paths: &[PathBuf]) -> Result<u64, String> {
    let mut tiled = BTreeMap::new();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "cu")) {
        let mut files = BTreeMap::new();
        add_file(path.clone(), &mut files)?;
        if files.contains_key(&path.with_file_name("tiles.cuh")) {
            tiled.append(&mut files);
        }
    }
    let code: Vec<String> = tiled.values().map(|text| code_of(text)).collect();
    Ok(digest(&code))
}

/// A source without comments and indentation: what was measured stays true when somebody mends a sentence.
fn code_of(text: &str) -> String {
    let code = |line: &'_ str| line.split("//").next().map(|code| code.trim().to_owned());
    text.lines().filter_map(code).filter(|code| !code.is_empty()).collect::<Vec<_>>().join("\n")
}

/// Writes `structs.rs`, `tables.rs` and `structs.cpp` to OUT_DIR. Returns the path of the last.
pub fn build() -> Result<PathBuf, String> {
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let entries = fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    let is = |path: &PathBuf, extension: &str| path.extension().is_some_and(|e| e == extension);
    paths.retain(|path| is(path, "cu") || is(path, "cuh"));
    // Headers come first, in the order of their names, which is also the order of their inclusion.
    paths.sort_by_key(|path| (is(path, "cu"), path.clone()));
    let (mut known, mut constants, mut structs) = (HashMap::new(), HashMap::new(), Vec::new());
    let mut modules = format!(
        "/// Digest of the sources of all kernels that have tiles.\npub const TILED: &str = \"{:016x}\";\n",
        digest_of_tiled(&paths)?
    );
    for path in paths {
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        structs.append(&mut read(&path, &text, &mut known, &mut constants)?);
        modules += &tables(&path, &text)?;
    }

    let mut rust = String::new();
    let mut cpp =
        String::from("#include <cstddef>\n#include <cstdint>\nstruct alignas(64) TensorMap { char opaque[128]; };\n");
    let mut used: Vec<_> =
        constants.iter().filter(|(name, _)| structs.iter().any(|s| s.text.contains(&**name))).collect();
    used.sort();
    used.iter().for_each(|(name, value)| cpp += &format!("constexpr int {name} = {value};\n"));
    cpp += "struct float2;\n";
    for Struct { name, file, text, fields, size, align } in &structs {
        let aligned = if *align > 8 { format!(", align({align})") } else { String::new() };
        let mut add = |line: String| writeln!(rust, "{line}").map_err(|e| e.to_string());
        add(format!("/// `{name}` of `{file}`."))?;
        add(format!("#[derive(Clone, Copy, Debug, Pod, Zeroable)]\n#[repr(C{aligned})]\npub struct {name} {{"))?;
        for f in fields {
            add(format!("    /// {}\n    pub {}: {},", documented(&f.comment, &f.name), f.name, f.rust))?;
        }
        add(format!("}}\nconst _: () = assert!(size_of::<{name}>() == {size});"))?;
        cpp += &format!(
            "{text}\nstatic_assert(sizeof({name}) == {size} && alignof({name}) == {align}, \"{file}: {name}\");\n"
        );
        for Field { name: field, offset, .. } in fields {
            add(format!("const _: () = assert!(std::mem::offset_of!({name}, {field}) == {offset});"))?;
            if !field.starts_with("padding_") {
                cpp += &format!("static_assert(offsetof({name}, {field}) == {offset}, \"{file}: {name}::{field}\");\n");
            }
        }
    }
    let write = |name: &str, text: String| {
        let path = out.join(name);
        fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display())).map(|()| path)
    };
    write("structs.rs", rust)?;
    write("tables.rs", modules)?;
    write("structs.cpp", cpp)
}
