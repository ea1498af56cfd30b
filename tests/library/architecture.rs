//! The drawing of modules in ARCHITECTURE.md is what the code does: who imports whom, and that it all points down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Graph = BTreeMap<String, BTreeSet<String>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            false => {}
        }
    }
}

/// `backend::gpu::engine` of src/backend/gpu/engine.rs, `backend` of src/backend/mod.rs.
fn module(path: &Path) -> Vec<String> {
    let inner = path.strip_prefix(root().join("src")).unwrap().with_extension("");
    let mut parts: Vec<String> = inner.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// A file's program, without its unit tests and comments.
fn program(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths that a text names after `start`, such as `a::b` of `crate::{a::b::C, d}`; groups are taken apart.
fn paths_after(text: &str, start: &str) -> Vec<Vec<String>> {
    fn path(text: &mut &str, before: &[String], found: &mut Vec<Vec<String>>) {
        let mut parts = before.to_vec();
        loop {
            *text = text.trim_start();
            if let Some(inner) = text.strip_prefix('{') {
                *text = inner;
                while !text.trim_start().starts_with('}') && !text.is_empty() {
                    path(text, &parts, found);
                    *text = text.trim_start().trim_start_matches(',');
                }
                *text = text.trim_start().strip_prefix('}').unwrap_or("");
                return;
            }
            let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
            let (word, rest) = text.split_at(end);
            parts.push(word.to_owned());
            *text = rest;
            match text.strip_prefix("::") {
                Some(rest) => *text = rest,
                None => break,
            }
        }
        // What follows a name, as `as x` and the `;`.
        *text = text.trim_start_matches(|c| !",{}".contains(c) && c != '\n');
        found.push(parts);
    }
    let mut found = Vec::new();
    for (at, _) in text.match_indices(start) {
        let joined = text[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':');
        if !joined {
            path(&mut &text[at + start.len()..], &[], &mut found);
        }
    }
    found
}

/// The names that src/lib.rs hands on, each with the module that it is from.
fn handed_on() -> BTreeMap<String, String> {
    let text = program(&root().join("src/lib.rs"));
    let all = paths_after(&text, "pub use ");
    all.into_iter().map(|path| (path[path.len() - 1].clone(), path[0].clone())).collect()
}

/// The names that a directory's mod.rs has from elsewhere, each with the path that it is from: whoever imports one of
/// them from there imports the file that defines it.
fn names_of(mod_rs: &Path, known: &BTreeSet<Vec<String>>) -> BTreeMap<String, Vec<String>> {
    let own = module(mod_rs);
    let full = |path: Vec<String>| {
        let above = match path[0].as_str() {
            "crate" => &[][..],
            "super" => &own[..own.len() - 1],
            _ if known.contains(&[&own[..], &path[..1]].concat()) => &[&own[..], &path[..1]].concat(),
            // Of another crate.
            _ => return None,
        };
        Some([above, &path[1..]].concat())
    };
    let all = paths_after(&program(mod_rs), "use ").into_iter().filter_map(full);
    all.map(|path| (path[path.len() - 1].clone(), path)).collect()
}

/// Every file's module with the modules that it names, as deep as files go.
fn imports() -> Graph {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let known: BTreeSet<Vec<String>> = files.iter().map(|file| module(file)).collect();
    let of_mods = files.iter().filter(|file| file.ends_with("mod.rs"));
    let names: BTreeMap<_, _> = of_mods.map(|file| (module(file), names_of(file, &known))).collect();
    // Where a path leads to by a name that a mod.rs has from elsewhere; none if it has no such name.
    let led_on = |path: &Vec<String>| {
        let end = (1..path.len()).rev().find(|&end| known.contains(&path[..end]))?;
        Some([names.get(&path[..end])?.get(&path[end])?, &path[end + 1..]].concat())
    };
    let handed_on = handed_on();
    let mut graph = Graph::new();
    for file in &files {
        let (own, text) = (module(file), program(file));
        let mut named = paths_after(&text, "crate::");
        named.extend(paths_after(&text, "edm2k::"));
        let from = |path: &Vec<String>| Some(vec![handed_on.get(path.first()?)?.clone()]);
        named.extend(named.iter().filter_map(from).collect::<Vec<_>>());
        for ups in 1..=3 {
            let start = "super::".repeat(ups);
            let above = &own[..own.len().saturating_sub(ups)];
            // Of `super::super::x`, `super::` once finds `super`, which is no module.
            named.extend(paths_after(&text, &start).into_iter().map(|path| [above, &path[..]].concat()));
        }
        let mut at = 0;
        while at < named.len() {
            named.extend(led_on(&named[at]).filter(|further| !named.contains(further)));
            at += 1;
        }
        let own_name = own.join("::");
        let targets = graph.entry(own_name.clone()).or_default();
        for mut path in named {
            while !path.is_empty() && !known.contains(&path) {
                path.pop();
            }
            let target = path.join("::");
            if !path.is_empty() && target != own_name {
                targets.insert(target);
            }
        }
    }
    graph
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap()
}

/// The modules below src/ with those that they import.
fn rooms(imports: &Graph) -> Graph {
    let mut rooms = Graph::new();
    for (from, to) in imports.iter().filter(|(from, _)| !["lib", "main"].contains(&from.as_str())) {
        let targets = to.iter().map(|to| top(to).to_owned()).filter(|to| to != top(from));
        rooms.entry(top(from).to_owned()).or_default().extend(targets);
    }
    rooms
}

/// The drawing: a line for each module, `name  -> what it imports`, in an order in which all arrows point down.
fn drawn() -> Vec<(String, BTreeSet<String>)> {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let drawing = page.split("```imports\n").nth(1).expect("a block ```imports in ARCHITECTURE.md");
    let lines = drawing.split("```").next().unwrap().lines();
    let row = |line: &str| {
        let (name, targets) = line.split_once("->").unwrap_or((line, ""));
        (name.trim().to_owned(), targets.split_whitespace().map(str::to_owned).collect())
    };
    lines.map(row).collect()
}

#[test]
fn the_drawing_is_what_the_code_imports() {
    let rooms = rooms(&imports());
    let drawn: Graph = drawn().into_iter().collect();
    let line = |(name, to): (&String, &BTreeSet<String>)| {
        format!("{name:<12} -> {}\n", to.iter().cloned().collect::<Vec<_>>().join(" "))
    };
    let differ = rooms.iter().filter(|&(name, to)| drawn.get(name) != Some(to)).map(line).collect::<String>();
    let gone: Vec<_> = drawn.keys().filter(|name| !rooms.contains_key(*name)).collect();
    assert!(differ.is_empty() && gone.is_empty(), "ARCHITECTURE.md should say\n{differ}and not have {gone:?}");
}

#[test]
fn all_arrows_of_the_drawing_point_down() {
    let drawn = drawn();
    for (i, (name, targets)) in drawn.iter().enumerate() {
        let above: Vec<_> = drawn[..i].iter().map(|(name, _)| name).filter(|name| targets.contains(*name)).collect();
        assert!(above.is_empty(), "{name} imports {above:?}, which stand above it");
    }
}

/// A parent that names its children, and children that name their parent's items, are one thing in several files.
#[test]
fn no_two_files_import_each_other_in_a_circle() {
    let imports = imports();
    let kin = |a: &str, b: &str| a.starts_with(&format!("{b}::")) || b.starts_with(&format!("{a}::"));
    let next = |name: &str| imports[name].iter().filter(|to| !kin(name, to)).cloned().collect::<Vec<_>>();
    let reach = |start: &String| {
        let (mut reached, mut at) = (BTreeSet::new(), vec![start.clone()]);
        while let Some(name) = at.pop() {
            at.extend(next(&name).into_iter().filter(|to| reached.insert(to.clone())));
        }
        reached
    };
    let reached: Graph = imports.keys().map(|name| (name.clone(), reach(name))).collect();
    let with = |name: &String| reached[name].iter().filter(|to| reached[*to].contains(name)).cloned().collect();
    let circles: BTreeSet<Vec<String>> =
        imports.keys().map(with).filter(|circle: &Vec<_>| !circle.is_empty()).collect();
    assert!(circles.is_empty(), "files that import each other in a circle: {circles:#?}");
}

/// What the tree says of each module of src/, in lower case; words of a name are joined by `_` there as in a file's name.
fn tree() -> BTreeMap<String, String> {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let tree = page.split("\nsrc/\n").nth(1).expect("src/ in the tree of ARCHITECTURE.md");
    let lines = tree.lines().take_while(|line| line.starts_with("  "));
    let (mut said, mut at) = (BTreeMap::<String, String>::new(), String::new());
    for line in lines {
        if !line.starts_with("   ") {
            let names = line.trim_start().split("  ").next().unwrap();
            at = names.rsplit(", ").next().unwrap().trim_end_matches(['/']).trim_end_matches(".rs").to_owned();
        }
        *said.entry(at.clone()).or_default() += &line.to_lowercase().replace('-', "_");
    }
    said
}

#[test]
fn every_file_is_named_in_the_tree() {
    let mut files = Vec::new();
    sources(&root().join("src"), &mut files);
    let (tree, commands) = (tree(), program(&root().join("src/main.rs")).to_lowercase());
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect()
    };
    let named = |file: &PathBuf| {
        let path = module(file);
        let (room, name) = (&path[0], &path[path.len() - 1]);
        let said = tree.get(room).map(|said| words(said)).unwrap_or_default();
        // The command line has a file for each subcommand.
        said.contains(name) || room == "cli" && words(&commands).contains(name)
    };
    let unnamed: Vec<_> = files.iter().filter(|file| !["lib", "main"].contains(&&*module(file).join("::"))).collect();
    let unnamed: Vec<_> = unnamed.into_iter().filter(|file| !named(file)).collect();
    assert!(unnamed.is_empty(), "the tree of ARCHITECTURE.md should name {unnamed:#?}");
}

#[test]
fn paths_are_found_in_groups_too() {
    let found = paths_after("use crate::{a::{b, c as d}, e::F};\nlet x = crate::g::h(1);", "crate::");
    let found: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a::b", "a::c", "e::F", "g::h"]);
    assert!(paths_after("mycrate::x", "crate::").is_empty());
}
