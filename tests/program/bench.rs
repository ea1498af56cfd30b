//! `edm2k bench --picture`.
#![cfg(feature = "cli")]

use std::process::Command;

use serde_json::Value;

fn bench(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_edm2k")).arg("bench").args(arguments).output().unwrap();
    (output.status.success(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[test]
fn a_picture_is_the_sum_of_its_parts() {
    let (fine, said) =
        bench(&["--picture", "--device", "cpu", "--model", "demo/emoji.safetensors", "--repeats", "2", "--json"]);
    assert!(fine, "{said}");
    let report: Value = serde_json::from_str(&said).unwrap();
    let parts = |row: usize| -> Vec<(&str, f64)> {
        let parts = report["rows"][row]["parts"].as_object().unwrap();
        parts.iter().map(|(part, seconds)| (part.as_str(), seconds.as_f64().unwrap())).collect()
    };
    let [first, after] = [parts(0), parts(1)];
    let names = |parts: &[(&str, f64)]| parts.iter().map(|(part, _)| part.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&after), ["sampling", "decoding", "PNG file"]);
    assert_eq!(names(&first)[..3], ["start of the process", "opening the device", "reading the model"]);
    assert_eq!(names(&first)[4..], names(&after));
    assert!(first.iter().chain(&after).all(|(_, seconds)| (0.0..60.0).contains(seconds)), "{report}");
    let sum: f64 = first.iter().map(|(_, seconds)| seconds).sum();
    assert!((sum - report["rows"][0]["median_s"].as_f64().unwrap()).abs() < 1e-6, "{report}");
    assert_eq!((&report["height"], &report["width"]), (&32.into(), &32.into()));
}

#[test]
fn what_goes_wrong_is_one_line() {
    let (fine, said) = bench(&["--picture", "--device", "cpu", "--model", "nowhere.safetensors"]);
    assert!(!fine && said.contains("nowhere.safetensors"), "{said}");
    let (fine, said) = bench(&["--model", "demo/emoji.safetensors"]);
    assert!(!fine && said.contains("--picture"), "{said}");
}
