//! The page of `edm2k serve` in a real browser: what a stranger does with it. Screenshots are left in target/page.
#![cfg(all(feature = "cli", feature = "serve", unix))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::server::{self, Server};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use edm2k::pictures::Picture;
use edm2k::sample::SamplerConfig;
use edm2k::{Device, Pipeline};
use fantoccini::key::Key;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};

/// Chromium under its driver, which are ended when it is dropped.
struct Browser {
    driver: Child,
    client: Client,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

impl Browser {
    /// A window of this size, in the system's light colours; `phone`: one that is touched.
    async fn open(width: u32, height: u32, phone: bool) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut driver = Command::new("chromedriver");
        let driver = driver.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let driver = driver.expect("chromedriver is missing; `make test-page` installs it");
        let mut options = json!({
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", format!("--window-size={width},{height}")],
        });
        if phone {
            options["mobileEmulation"] =
                json!({"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2.0}});
        }
        let wanted = json!({"goog:chromeOptions": options});
        let started = Instant::now();
        let client = loop {
            let mut builder = ClientBuilder::new(HttpConnector::new());
            match builder
                .capabilities(wanted.as_object().unwrap().clone())
                .connect(&format!("http://127.0.0.1:{port}"))
                .await
            {
                Ok(client) => break client,
                Err(why) => assert!(started.elapsed() < Duration::from_secs(60), "no browser: {why}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        Self { driver, client }
    }

    async fn goto(&self, server: &Server) {
        self.client.goto(&format!("http://{}/", server.address)).await.unwrap();
        // Whatever goes wrong from here on.
        let script = "window.wrong = []; addEventListener('error', e => wrong.push(e.message));
            addEventListener('unhandledrejection', e => wrong.push(String(e.reason)));
            addEventListener('securitypolicyviolation', e => wrong.push(e.violatedDirective + ' ' + e.blockedURI))";
        self.run(script).await;
    }

    async fn run(&self, script: &str) -> Value {
        self.client.execute(script, vec![]).await.unwrap_or_else(|why| panic!("{script}: {why}"))
    }

    async fn click(&self, css: &str) {
        let found = self.client.find(Locator::Css(css)).await.unwrap_or_else(|why| panic!("{css}: {why}"));
        found.click().await.unwrap_or_else(|why| panic!("{css}: {why}"));
    }

    async fn type_into(&self, css: &str, text: &str) {
        self.client.find(Locator::Css(css)).await.unwrap().send_keys(text).await.unwrap();
    }

    /// Replaces the text of a field.
    async fn set(&self, css: &str, text: &str) {
        let field = self.client.find(Locator::Css(css)).await.unwrap();
        field.send_keys(&format!("{}a{}", char::from(Key::Control), char::from(Key::Null))).await.unwrap();
        field.send_keys(text).await.unwrap();
    }

    /// Waits until an expression is true; its value.
    async fn until(&self, expression: &str) -> Value {
        let started = Instant::now();
        loop {
            let value = self.run(&format!("return {expression}")).await;
            if value != json!(false) && value != Value::Null && value != json!(0) && value != json!("") {
                return value;
            }
            if started.elapsed() > Duration::from_secs(90) {
                let said = self.run("return [document.getElementById('problem').textContent, document.getElementById('toast').textContent, window.wrong]").await;
                self.shoot("failed").await;
                panic!("never true: {expression}; the page says {said}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn shoot(&self, name: &str) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/page");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("{name}.png")), self.client.screenshot().await.unwrap()).unwrap();
    }

    /// The file of the finished picture of a seed, which the newest of that seed in the gallery shows too.
    async fn picture(&self, seed: u64) -> Vec<u8> {
        // The page may not fetch the gallery's own copies; it may look at them.
        let script = format!(
            "const done = arguments[0];
            const image = (list, end) => [...document.querySelectorAll(list + ' img')].find(i => i.alt.endsWith(end));
            const made = image('#board', 'Picture of seed {seed}'), kept = image('#gallery', ' seed {seed}');
            const pixels = image => {{
                const canvas = Object.assign(document.createElement('canvas'),
                    {{width: image.naturalWidth, height: image.naturalHeight}}).getContext('2d');
                canvas.drawImage(image, 0, 0);
                return canvas.getImageData(0, 0, image.naturalWidth, image.naturalHeight).data.join(); }};
            if (pixels(made) !== pixels(kept)) done('the gallery shows another picture');
            else fetch(made.src).then(r => r.blob()).then(blob => {{
                const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(blob); }})"
        );
        let url = self.client.execute_async(&script, vec![]).await.unwrap();
        let (_, data) = url.as_str().unwrap().split_once(',').unwrap_or_else(|| panic!("seed {seed}: {url}"));
        BASE64_STANDARD.decode(data).unwrap()
    }

    /// Drops a file onto the page, as a hand would.
    async fn drop_file(&self, name: &str, bytes: &[u8]) {
        let script = "const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
            const data = new DataTransfer(); data.items.add(new File([bytes], arguments[1], {type: 'image/png'}));
            for (const kind of ['dragenter', 'dragover', 'drop'])
                document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}))";
        self.client.execute(script, vec![json!(BASE64_STANDARD.encode(bytes)), json!(name)]).await.unwrap();
    }

    /// Nothing broke the page's own rules, nothing failed unseen.
    async fn nothing_went_wrong(&self) {
        assert_eq!(self.run("return window.wrong").await, json!([]));
    }
}

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(name)
}

/// A run that looks like a real one, with snapshots that are the demo's model.
fn run_directory(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let lines: String = (1..=160).map(line).collect();
    fs::write(dir.join("stats.jsonl"), lines).unwrap();
    for nimg in [160_000, 320_000] {
        fs::copy(demo("grid.png"), dir.join(format!("grid-{nimg:09}.png"))).unwrap();
        fs::copy(demo("emoji.safetensors"), dir.join(format!("snapshot-{nimg:09}-0.100.safetensors"))).unwrap();
    }
}

/// Lines of statistics after `at` intervals.
fn line(at: u64) -> String {
    let (nimg, x) = (2000 * at, at as f64);
    let wave = (x * 1.7).sin() * 0.012 + (x * 0.61).cos() * 0.008;
    let loss = 0.32 + 0.9 / (1.0 + x / 6.0) + wave;
    let status = json!({"nimg": nimg, "step": nimg / 64, "loss": loss, "lr": 0.01 / (1.0 + x / 60.0).sqrt(),
        "grad_norm": 0.4, "nonfinite": 0, "images_per_s": 57.0 + 40.0 * wave, "seconds": nimg as f64 / 57.0, "peak_mib": 900.0});
    let check = json!({"nimg": nimg, "validation_loss": 0.35 + 0.88 / (1.0 + x / 6.0)});
    if at.is_multiple_of(5) { format!("{status}\n{check}\n") } else { format!("{status}\n") }
}

const CHIPS: &str = "[...document.querySelectorAll('#sets .tags:first-child > .chip')].filter(c => c.ariaLabel?.startsWith('Remove ') && c.textContent !== '✕').map(c => c.textContent)";
const PREVIEWS: &str = "[...document.querySelectorAll('#board img')].filter(i => i.src.startsWith('data:')).length";
const FINISHED: &str = "[...document.querySelectorAll('#board img')].filter(i => i.src.includes('/pictures/') && i.complete && i.naturalWidth).length";

#[tokio::test]
#[ignore = "it needs a browser: make test-page"]
async fn a_stranger_draws_cancels_restores_and_watches_a_run() {
    let dir = tempfile::tempdir().unwrap();
    run_directory(&dir.path().join("runs/emoji"));
    let [model, conditions] =
        ["emoji.safetensors", "conditions.safetensors"].map(|name| demo(name).display().to_string());
    // Another model whose file has the same name.
    fs::create_dir(dir.path().join("other")).unwrap();
    fs::copy(&model, dir.path().join("other/emoji.safetensors")).unwrap();
    let models = ["--model", &model, "--model", "other/emoji.safetensors"];
    let server =
        Server::start(dir.path(), &[&models[..], &["--condition-model", &conditions, "--runs", "runs"]].concat());
    let browser = Browser::open(1360, 960, false).await;
    browser.goto(&server).await;
    browser.until("!document.getElementById('go').disabled && document.querySelector('#sets .tags input')").await;
    let nameless = "return [...document.querySelectorAll('input, select, button')]
        .filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)";
    assert_eq!(browser.run(nameless).await, json!([]), "screen readers find no name");

    // Tags: by name and comma, by completion and arrows, and one that is unknown.
    browser.type_into("#sets .tags input", "red,").await;
    browser.until(&format!("{CHIPS}.join() === 'red'")).await;
    browser.type_into("#sets .tags input", "hea").await;
    browser.until("document.querySelectorAll('.options [role=option]').length > 2").await;
    let counts =
        browser.run("return [...document.querySelectorAll('.options span')].map(s => Number(s.textContent))").await;
    assert!(counts.as_array().unwrap().iter().all(|count| count.as_u64() > Some(0)), "{counts}");
    browser.shoot("completion").await;
    let down = char::from(Key::Down);
    while browser.run("return document.querySelector('.options [aria-selected=true]')?.firstChild.textContent").await
        != "heart"
    {
        browser.type_into("#sets .tags input", &down.to_string()).await;
    }
    browser.type_into("#sets .tags input", &char::from(Key::Enter).to_string()).await;
    browser.until(&format!("{CHIPS}.join() === 'red,heart'")).await;
    browser.type_into("#sets .tags input", "smilling,").await;
    browser.until("document.querySelector('.unknown')?.textContent.includes('did you mean')").await;
    browser.shoot("unknown").await;
    browser.run("document.querySelector('#sets .tags input').value = ''; document.querySelector('#sets .tags input').dispatchEvent(new Event('input'))").await;

    // A picture: previews, then the file of `edm2k sample`.
    browser.set("#seeds", "7-10").await;
    browser.set("#steps", "60").await;
    browser.click("#go").await;
    browser.until(&format!("{PREVIEWS} === 4")).await;
    browser.shoot("drawing").await;
    let preview = browser.run("return document.querySelector('#board img').src").await;
    browser.until(&format!("document.querySelector('#board img').src !== {preview}")).await;
    assert!(
        browser
            .run("return document.getElementById('progress-text').textContent")
            .await
            .as_str()
            .unwrap()
            .contains("it/s")
    );
    browser.until(&format!("{FINISHED} === 4 && document.querySelectorAll('#gallery img').length === 4")).await;
    let sample = |options: &[&str], out: &str| {
        let out = dir.path().join(out);
        let sampled = Command::new(env!("CARGO_BIN_EXE_edm2k"))
            .args(["sample", "--device", "cpu", "--model", &model, "--condition-model", &conditions, "--outdir"])
            .arg(&out)
            .args(options)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status();
        assert!(sampled.unwrap().success());
        out
    };
    let out = sample(&["--tags", "red, heart", "--seeds", "7-10", "--steps", "60"], "out");
    let mut files = Vec::new();
    for seed in 7..=10 {
        let file = browser.picture(seed).await;
        assert!(
            file == fs::read(out.join(format!("{seed:06}.png"))).unwrap(),
            "seed {seed} is not what edm2k sample draws"
        );
        files.push(file);
    }

    // The details of one, and the same in the dark.
    browser.click("#gallery li:last-child button").await;
    browser.until("document.getElementById('large').complete").await;
    let parameters = browser.run("return document.getElementById('parameters').textContent").await;
    assert!(parameters.as_str().unwrap().contains("heart, red"), "{parameters}");
    browser.shoot("picture").await;
    browser.click("#picture .close").await;
    browser.click("#theme").await;
    browser.shoot("dark").await;

    // One job, cancelled at the next step.
    browser.set("#steps", "1000").await;
    browser
        .type_into(
            "#steps",
            &format!("{}{}{}", char::from(Key::Control), char::from(Key::Enter), char::from(Key::Null)),
        )
        .await;
    browser.until(&format!("{PREVIEWS} === 4")).await;
    assert_eq!(server.get("/api/v1/jobs").json().as_array().unwrap().len(), 1, "one key, several jobs");
    browser.type_into("body", &char::from(Key::Escape).to_string()).await;
    browser.until("document.getElementById('progress-text').textContent.startsWith('Cancelled')").await;
    browser.until("document.getElementById('cancel').hidden").await;
    assert!(server.get("/api/v1/jobs").json().as_array().unwrap().is_empty());

    // A dropped PNG brings its parameters back.
    browser.run("document.querySelector('.tags > .chip').click()").await;
    browser.set("#guidance", "1").await;
    browser.drop_file("000009.png", &files[2]).await;
    browser.until(&format!("{CHIPS}.join() === 'heart,red' || {CHIPS}.join() === 'red,heart'")).await;
    let form = browser
        .run("return ['seeds', 'steps', 'guidance', 'solver', 'width'].map(id => document.getElementById(id).value)")
        .await;
    assert_eq!(form, json!(["9", "60", "5", "dpmpp_2m", "32"]));
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 1 && document.querySelectorAll('#gallery img').length === 5")).await;
    assert!(browser.picture(9).await == files[2], "the same parameters, another picture");

    // A weight by the arrow keys and a tag to avoid, drawn as `edm2k sample` draws them, and brought back by the PNG.
    let up = char::from(Key::Up);
    browser.run("[...document.querySelectorAll('#sets .chip')].find(c => c.textContent === 'heart').focus()").await;
    for _ in 0..2 {
        browser.client.active_element().await.unwrap().send_keys(&up.to_string()).await.unwrap();
    }
    browser.until("[...document.querySelectorAll('#sets .chip')].some(c => c.textContent === 'heart ×1.2')").await;
    browser.type_into("#negative .tags input", "green,").await;
    const AVOIDED: &str = "[...document.querySelectorAll('#negative .tags > .chip')].map(c => c.textContent).join()";
    browser.until(&format!("{AVOIDED} === 'green'")).await;
    browser.set("#seeds", "11").await;
    browser.set("#steps", "16").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 1 && document.querySelectorAll('#gallery img').length === 6")).await;
    browser.shoot("weighed").await;
    let weighed = browser.picture(11).await;
    let options = ["--tags", "(heart:1.2), red", "--negative", "green", "--seeds", "11", "--steps", "16"];
    let expected = fs::read(sample(&options, "weighed").join("000011.png")).unwrap();
    assert!(weighed == expected, "weights and tags to avoid are not what edm2k sample draws");
    browser.run("for (const chip of document.querySelectorAll('.tags > .chip')) chip.click()").await;
    browser.until(&format!("{AVOIDED} === ''")).await;
    browser.drop_file("000011.png", &weighed).await;
    browser.until(&format!("{AVOIDED} === 'green' && {CHIPS}.join() === 'heart ×1.2,red'")).await;

    // What has no place in the form is named, and of conditions nothing is taken over by halves.
    let about = |seeds: Value, more: &[(&str, Value)]| {
        let sampler = SamplerConfig { steps: 3, guidance: 2.05, ..SamplerConfig::default() };
        let mut about = json!({"model": "emoji.pt", "width": 32, "height": 32, "sampler": sampler});
        about["seeds"] = seeds;
        more.iter().for_each(|(key, value)| about[key] = value.clone());
        Picture::new(1, 1, vec![0; 3]).png(&[("edm2k", &about.to_string())]).unwrap()
    };
    let toast = |text: &str| format!("document.getElementById('toast').textContent === 'Parameters taken over{text}.'");
    let [red, cat] = [json!({"tags": "red", "negative": {"tags": "cat"}}), json!({"tags": "cat"})];
    browser.drop_file("large.png", &about(json!([9007199254740993u64]), &[("condition", red.clone())])).await;
    browser.until("document.getElementById('seeds').value === '9007199254740993'").await;
    browser.until(&toast("")).await;
    browser.until(&format!("{CHIPS}.join() === 'red' && {AVOIDED} === 'cat'")).await;
    assert_eq!(browser.run("return document.getElementById('guidance').validity.valid").await, true);
    let row = [("conditions", json!([{"from": red, "to": cat, "share": 0.5}])), ("from", json!("drawing.png"))];
    browser.drop_file("row.png", &about(json!([7, 7, 2]), &row)).await;
    browser.until(&toast(", but not its conditions, its seeds, what it began from")).await;
    browser.until(&format!("{CHIPS}.join() === '' && {AVOIDED} === ''")).await;
    browser
        .drop_file("two.png", &about(json!([1, 2]), &[("conditions", json!([red, cat])), ("gnet", json!("xs"))]))
        .await;
    browser.until(&toast(", but not its conditions, the network that guided it")).await;
    browser.drop_file("other.png", &about(json!([3]), &[("model", json!("unknown.pkl"))])).await;
    browser.until(&toast(", but not its model")).await;

    // Nothing is asked for while a field is wrong, and one sees which.
    browser.run("document.getElementById('steps').value = ''; document.getElementById('rho').value = 0").await;
    browser.click("#go").await;
    browser.until("document.getElementById('more').open && document.activeElement.id === 'steps'").await;
    browser.run("document.getElementById('more').open = false; document.getElementById('rho').value = 7").await;

    browser.drop_file("plain.png", b"no picture").await;
    browser.until("document.getElementById('toast').textContent.includes('no parameters')").await;

    // Four rows of four that nobody asked for by name.
    browser.run("for (const chip of document.querySelectorAll('.tags > .chip')) chip.click()").await;
    browser.set("#steps", "16").await;
    browser.click("#invent-grid").await;
    browser.until(&format!("{FINISHED} === 16")).await;
    browser.shoot("invented").await;
    browser.click("#theme").await;
    browser.shoot("light").await;

    // A picture of the second model knows which it is.
    let choose = |name: &str| {
        format!("const model = document.getElementById('model'); model.value = '{name}'; return model.onchange()")
    };
    browser.run(&choose("emoji-2")).await;
    browser.set("#invent", "0").await;
    browser.set("#seeds", "12").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 1 && document.querySelector('#gallery img').alt.endsWith('seed 12')")).await;
    browser.run(&choose("emoji")).await;
    browser.click("#gallery li:first-child button").await;
    browser.click("#again").await;
    browser.until("document.getElementById('model').value === 'emoji-2'").await;

    // A run while it goes, and its snapshot.
    browser.click("#tab-runs").await;
    browser
        .until(
            "document.querySelectorAll('.chart .curve').length === 4 && document.querySelector('.grids img')?.complete",
        )
        .await;
    assert_eq!(browser.run("return document.querySelector('.numbers dd').textContent").await, "320k");
    browser.shoot("run").await;
    let mut stats = fs::OpenOptions::new().append(true).open(dir.path().join("runs/emoji/stats.jsonl")).unwrap();
    std::io::Write::write_all(&mut stats, line(161).as_bytes()).unwrap();
    browser.until("document.querySelector('.numbers dd').textContent === '322k'").await;
    browser.click("#theme").await;
    browser.shoot("run-dark").await;
    browser.click(".snapshots button").await;
    browser.until("document.getElementById('model').value.startsWith('emoji/snapshot-000320000')").await;
    browser.set("#seeds", "3").await;
    browser.set("#invent", "0").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 1")).await;
    browser.nothing_went_wrong().await;
}

#[tokio::test]
#[ignore = "it needs a browser: make test-page"]
async fn classes_are_chosen_by_name_and_a_page_that_is_loaded_again_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    server::tiny(&dir.path().join("m.safetensors"), 3);
    let config = Pipeline::load(&Device::open("cpu").unwrap(), dir.path().join("m.safetensors")).unwrap();
    let config = config.net().config.clone();
    server::write(&config, &dir.path().join("c.safetensors"), 4, |_| {});
    let names = "tench, Tinca tinca\ngoldfish\ngreat white shark, white shark\nshark\n";
    fs::write(dir.path().join("names.txt"), names).unwrap();
    let models = ["--model", "c.safetensors", "--class-names", "names.txt", "--model", "m.safetensors"];
    let server = Server::start(dir.path(), &models);
    let browser = Browser::open(1360, 960, false).await;
    browser.goto(&server).await;
    let ready = "!document.getElementById('go').disabled && document.querySelector('#sets .tags input')";
    browser.until(ready).await;
    let hint = browser.run("return document.getElementById('tags-hint').textContent").await;
    assert!(hint.as_str().unwrap().starts_with("Type to find one of the 5 classes"), "{hint}");

    // By completion, by a number, by another name; an unknown one.
    let enter = char::from(Key::Enter).to_string();
    for (typed, chips) in [
        ("gold", "goldfish"),
        ("0", "goldfish|tench, Tinca tinca"),
        ("White Shark", "goldfish|tench, Tinca tinca|great white shark, white shark"),
        ("4", "goldfish|tench, Tinca tinca|great white shark, white shark|4"),
    ] {
        browser.type_into("#sets .tags input", typed).await;
        browser.type_into("#sets .tags input", &enter).await;
        browser.until(&format!("{CHIPS}.join('|') === '{chips}'")).await;
    }
    browser.type_into("#sets .tags input", "goldfsh").await;
    browser.type_into("#sets .tags input", &enter).await;
    let asked = "document.querySelector('.unknown')?.textContent.trim()";
    browser.until(&format!("{asked} === 'There is no class “goldfsh”, did you mean goldfish'")).await;
    browser.run("document.querySelector('#sets .tags input').value = ''; document.querySelector('#sets .tags input').dispatchEvent(new Event('input'))").await;
    // One is left out, and one avoided; a second takes the place of the first.
    browser.run("document.querySelectorAll('#sets .chip')[3].click()").await;
    for (class, name) in [("3", "shark"), ("4", "4")] {
        browser.type_into("#negative input", class).await;
        browser.type_into("#negative input", &enter).await;
        browser.until(&format!("document.querySelector('#negative').textContent === '{name}'")).await;
    }
    browser.set("#seeds", "7-9").await;
    browser.set("#steps", "3").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 3 && document.querySelectorAll('#gallery img').length === 3")).await;
    browser.shoot("classes").await;
    let sampled = |options: &[&str], out: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
        command.current_dir(dir.path()).args([
            "sample",
            "--device",
            "cpu",
            "--model",
            "c.safetensors",
            "--outdir",
            out,
        ]);
        assert!(command.args(options).output().unwrap().status.success());
        dir.path().join(out)
    };
    let out = sampled(
        &[
            "--class",
            "1",
            "--class",
            "0",
            "--class",
            "2",
            "--negative",
            "4",
            "--seeds",
            "7-9",
            "--steps",
            "3",
            "--class-names",
            "names.txt",
        ],
        "out",
    );
    let shark = browser.picture(9).await;
    assert!(shark == fs::read(out.join("000009.png")).unwrap(), "not what edm2k sample draws");

    // Of a model of tags the field is one of tags, and nothing is left in it.
    let choose = |name: &str| {
        format!("const m = document.getElementById('model'); m.value = '{name}'; m.dispatchEvent(new Event('change'))")
    };
    browser.run(&choose("m")).await;
    browser.until("document.getElementById('conditions-legend').textContent === 'Tags'").await;
    browser.until(&format!("{CHIPS}.length === 0 && document.querySelector('#negative').textContent === ''")).await;
    // The picture brings its model and classes back.
    browser.drop_file("000009.png", &shark).await;
    browser.until(&format!("{CHIPS}.join('|') === 'great white shark, white shark'")).await;
    assert_eq!(browser.run("return document.querySelector('#negative').textContent").await, "4");

    // One that was drawn without any class cannot be asked for here.
    let bare = fs::read(sampled(&["--seeds", "3", "--steps", "2"], "bare").join("000003.png")).unwrap();
    browser.drop_file("000003.png", &bare).await;
    browser.until("document.getElementById('toast').textContent.endsWith('but not its conditions.')").await;
    browser.drop_file("000009.png", &shark).await;
    browser.until(&format!("{CHIPS}.join('|') === 'great white shark, white shark'")).await;
    browser.run("document.querySelector('#negative .chip').click()").await;

    // A random class for each seed; then the page is loaded again while a job runs, which goes on.
    browser.run("document.querySelector('#sets .chip').click()").await;
    browser.set("#seeds", "0-3").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 4 && document.querySelectorAll('#gallery img').length === 7")).await;
    let captions = "[...document.querySelectorAll('#gallery span')].map(s => s.textContent).join('|')";
    let before = browser.run(&format!("return {captions}")).await;
    browser.set("#steps", "1000").await;
    browser.click("#go").await;
    browser.until(&format!("{PREVIEWS} === 4")).await;
    browser.nothing_went_wrong().await;
    // One chip, and something that is typed and not taken yet.
    browser.type_into("#sets .tags input", "tench").await;
    browser.type_into("#sets .tags input", &enter).await;
    browser.type_into("#sets .tags input", "shar").await;
    browser.goto(&server).await;
    browser.until(ready).await;
    browser.until(&format!("{PREVIEWS} === 4")).await;
    assert_eq!(server.get("/api/v1/jobs").json().as_array().unwrap().len(), 1, "the job was cancelled");
    browser.until(&format!("{captions} === {before}")).await;
    let form = browser.run("return ['model', 'seeds', 'steps'].map(id => document.getElementById(id).value)").await;
    assert_eq!(form, json!(["c", "0-3", "1000"]));
    assert_eq!(browser.run(&format!("return {CHIPS}")).await, json!(["tench, Tinca tinca"]));
    assert_eq!(browser.run("return document.querySelector('#sets .tags input').value").await, "shar");
    browser.click("#cancel").await;
    browser.until("document.getElementById('progress-text').textContent.startsWith('Cancelled')").await;
    browser.nothing_went_wrong().await;
    // Loaded again: what is known of classes by then is that one is typed exactly, whatever completes it.
    browser.set("#sets .tags input", "shark").await;
    browser.until("document.querySelectorAll('.options [role=option]').length === 2").await;
    browser.type_into("#sets .tags input", &enter).await;
    browser.until(&format!("{CHIPS}.join('|') === 'tench, Tinca tinca|shark'")).await;

    // Another server on the same address has other jobs, which may have the same numbers.
    let address = server.address.trim_end_matches('/').to_owned();
    server.stop();
    let server = Server::start_at(&address, dir.path(), &models);
    server.post("/api/v1/generate?wait=true", &json!({"sampler": {"steps": 1}})).expect(200);
    browser.goto(&server).await;
    browser.until("!document.getElementById('go').disabled && document.getElementById('seeds').value === '0-3'").await;
    browser.set("#sets .tags input", "4").await;
    browser.set("#seeds", "5-7").await;
    browser.set("#steps", "2").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 3 && document.querySelectorAll('#gallery img').length >= 3")).await;
    assert_eq!(browser.run("return document.querySelectorAll('#gallery img').length").await, 3);
    browser.nothing_went_wrong().await;
}

#[tokio::test]
#[ignore = "it needs a browser: make test-page"]
async fn on_a_phone_everything_fits_and_the_token_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    run_directory(&dir.path().join("runs/emoji"));
    let [model, conditions] =
        ["emoji.safetensors", "conditions.safetensors"].map(|name| demo(name).display().to_string());
    let token = "sixteen-characters-at-least";
    let arguments = ["--model", &model, "--condition-model", &conditions, "--runs", "runs", "--token", token];
    let server = Server::start(dir.path(), &arguments);
    let browser = Browser::open(390, 844, true).await;
    browser.goto(&server).await;
    browser.until("document.getElementById('login').open").await;
    browser.type_into("#token", "wrong").await;
    browser.click("#login button").await;
    browser.until("document.getElementById('login-problem').textContent").await;
    browser.shoot("phone-token").await;
    browser.set("#token", token).await;
    browser.click("#login button").await;
    browser.until("!document.getElementById('login').open && !document.getElementById('go').disabled && document.querySelector('#sets .tags input')").await;
    let fits = "return document.documentElement.scrollWidth <= innerWidth";
    browser.type_into("#sets .tags input", "cat,").await;
    browser.until(&format!("{CHIPS}.join() === 'cat'")).await;
    assert_eq!(browser.run(fits).await, true);
    browser.shoot("phone").await;
    browser.click("#go").await;
    browser.until(&format!("{FINISHED} === 4")).await;
    browser.run("document.getElementById('stage').scrollIntoView()").await;
    browser.shoot("phone-drawn").await;
    assert_eq!(browser.run(fits).await, true);
    browser.run("scrollTo(0, 0)").await;
    browser.click("#tab-runs").await;
    browser.until("document.querySelectorAll('.chart .curve').length === 4").await;
    assert_eq!(browser.run(fits).await, true);
    browser.shoot("phone-run").await;
    browser.nothing_went_wrong().await;
}
