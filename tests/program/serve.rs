//! `edm2k serve` from outside: what it draws, what it says of that, and what it refuses.
#![cfg(all(feature = "cli", feature = "serve", unix))]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::autoencoder;
#[cfg(feature = "onnx")]
use crate::common::onnx;
use crate::common::place;
use crate::common::server::{self, Server, message, of_width, tiny};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use edm2k::model::Config;
use edm2k::sample::SamplerConfig;
use edm2k::{Device, Pipeline, Request};
use serde_json::{Value, json};

/// A directory with models.
enum Here {}
type Place = place::Place<Here>;

impl Place {
    fn new() -> Self {
        let place = Self::empty();
        tiny(&place.path("m.safetensors"), 3);
        place
    }

    fn serve(&self, arguments: &str) -> Server {
        Server::start(self.dir(), &arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// What `edm2k` says with these arguments ('|' quotes), which it fails or succeeds with.
    fn edm2k(&self, arguments: &str) -> (bool, String) {
        let mut command = self.command("");
        for (i, part) in arguments.split('|').enumerate() {
            match i % 2 {
                0 => command.args(part.split_whitespace()),
                _ => command.arg(part),
            };
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The pictures that `edm2k sample` makes, by seed.
    fn sample(&self, arguments: &str, seeds: &[u64]) -> Vec<Vec<u8>> {
        let (fine, said) = self.edm2k(&format!("sample --device cpu --outdir reference --overwrite {arguments}"));
        assert!(fine, "{arguments}: {said}");
        seeds.iter().map(|seed| fs::read(self.path(&format!("reference/{seed:06}.png"))).unwrap()).collect()
    }
}

/// A model that was always trained with conditions.
fn always(place: &Place) {
    let config =
        Pipeline::load(&Device::open("cpu").unwrap(), place.path("m.safetensors")).unwrap().net().config.clone();
    server::write(&config, &place.path("always.safetensors"), 5, |model| {
        model.meta.vocabulary = server::TAGS.map(String::from).to_vec();
        model.meta.cond_dropout = Some(0.0);
    });
}

fn png(picture: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(picture["png"].as_str().unwrap()).unwrap()
}

/// The pictures of a job that was waited for, in order.
fn pictures(job: &Value) -> Vec<Vec<u8>> {
    let mut all: Vec<&Value> = job["pictures"].as_array().unwrap().iter().collect();
    all.sort_by_key(|picture| picture["index"].as_u64());
    all.into_iter().map(png).collect()
}

/// A job of many steps: seconds.
fn long() -> Value {
    json!({"seeds": "0-3", "sampler": {"steps": 1000}})
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what} never came");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn pictures_are_those_of_edm2k_sample_to_the_byte() {
    let place = Place::new();
    always(&place);
    let server = place.serve("--model m.safetensors --model always.safetensors --batch 3");
    for (wanted, arguments, seeds) in [
        (json!({}), "--model m.safetensors", &[0][..]),
        (
            json!({"tags": ["cat, red", "dog"], "per_condition": 2, "seeds": "7,3-5", "sampler": {"steps": 4}}),
            "--model m.safetensors --tags |cat, red| --tags dog --per-condition 2 --seeds 7,3-5 --steps 4",
            &[7, 3, 4, 5],
        ),
        (
            json!({"tags": ["heart"], "width": 24, "height": 16, "seeds": "9", "sampler": {
                "solver": "heun", "steps": 3, "guidance": 2.5, "guidance_interval": [0.1, 20.0], "rho": 6.0,
                "sigma_min": 0.01, "sigma_max": 50.0, "churn": {"s_churn": 2.0, "s_noise": 1.003},
            }}),
            "--model m.safetensors --tags heart --size 24x16 --seeds 9 --solver heun --steps 3 --guidance 2.5 \
             --guidance-interval 0.1,20 --rho 6 --sigma-min 0.01 --sigma-max 50 --S-churn 2 --S-noise 1.003",
            &[9],
        ),
        (
            json!({"tags": ["(cat:1.5), [red]"], "negative": "dog, (heart:2)", "seeds": "4", "sampler": {"steps": 4}}),
            "--model m.safetensors --tags |(cat:1.5), [red]| --negative |dog, (heart:2)| --seeds 4 --steps 4",
            &[4],
        ),
        (
            json!({"negative": "dog", "seeds": "5", "sampler": {"steps": 4}}),
            "--model m.safetensors --negative dog --seeds 5 --steps 4",
            &[5],
        ),
        // Its guidance has nothing to lead away from but negatives.
        (
            json!({"model": "always", "tags": ["cat"], "seeds": "6", "sampler": {"steps": 4}}),
            "--model always.safetensors --tags cat --seeds 6 --steps 4",
            &[6],
        ),
        (
            json!({"model": "always", "tags": ["cat"], "negative": "dog", "seeds": "6", "sampler": {"steps": 4}}),
            "--model always.safetensors --tags cat --negative dog --seeds 6 --steps 4",
            &[6],
        ),
        (
            json!({"model": "always", "tags": ["cat"], "seeds": "6", "sampler": {"steps": 4, "guidance": 3.0}}),
            "--model always.safetensors --tags cat --seeds 6 --steps 4 --guidance 3",
            &[6],
        ),
    ] {
        let job = server.post("/api/v1/generate?wait=true", &wanted).expect(200);
        document().check("Job", &job);
        let expected = place.sample(arguments, seeds);
        assert_eq!(pictures(&job).len(), seeds.len());
        for ((seed, ours), theirs) in seeds.iter().zip(pictures(&job)).zip(expected) {
            assert!(ours == theirs, "{wanted}: seed {seed} differs from that of edm2k sample");
        }
        let url = job["pictures"][0]["url"].as_str().unwrap();
        let file = server.get(url);
        assert_eq!((file.status, file.header("content-type")), (200, Some("image/png")));
        assert_eq!(file.body, png(&job["pictures"][0]));
    }
}

/// Models that were always trained with a class: of five `c.safetensors` and `g.safetensors`, of six `o.safetensors`. And
/// `u.safetensors`, which knows no classes.
fn of_classes(place: &Place) {
    let config =
        Pipeline::load(&Device::open("cpu").unwrap(), place.path("m.safetensors")).unwrap().net().config.clone();
    for (name, seed, label_dim) in [("c", 6, 5), ("g", 7, 5), ("u", 8, 0), ("o", 9, 6)] {
        server::write(
            &Config { label_dim, ..config.clone() },
            &place.path(&format!("{name}.safetensors")),
            seed,
            |model| {
                model.meta.cond_dropout = Some(0.0);
            },
        );
    }
    fs::write(place.path("names.txt"), "tench, Tinca tinca\ngoldfish\ncrane\nCrane, crane\n").unwrap();
}

#[test]
fn class_conditional_models_draw_as_edm2k_sample_does() {
    let place = Place::new();
    of_classes(&place);
    let server = place.serve("--model c.safetensors --model m.safetensors --class-names names.txt --batch 3");
    let models = server.get("/api/v1/models").expect(200);
    let about = |place: usize| [&models[place]["classes"], &models[place]["tags"], &models[place]["guided"]];
    assert_eq!(about(0), [&json!(5), &json!("no"), &json!(false)]);
    assert_eq!(about(1), [&json!(0), &json!("plain"), &json!(true)]);
    for (wanted, arguments, seeds) in [
        (
            json!({"classes": ["1", "Tinca tinca"], "per_condition": 2, "seeds": "5-8", "sampler": {"steps": 3}}),
            "--class goldfish --class 0 --per-condition 2 --seeds 5-8 --steps 3",
            &[5, 6, 7, 8][..],
        ),
        (
            json!({"classes": ["random"], "seeds": "0-4", "sampler": {"steps": 2}}),
            "--class random --seeds 0-4 --steps 2",
            &[0, 1, 2, 3, 4],
        ),
        (
            json!({"classes": ["crane"], "negative": "goldfish", "sampler": {"steps": 2, "guidance": 3.0}}),
            "--class 2 --negative 1 --steps 2 --guidance 3",
            &[0],
        ),
    ] {
        let job = server.post("/api/v1/generate?wait=true", &wanted).expect(200);
        let sampled = place.sample(&format!("--model c.safetensors --class-names names.txt {arguments}"), seeds);
        assert!(pictures(&job) == sampled, "{wanted}");
    }
    let listed = server.get("/api/v1/vocabulary").expect(200);
    let names: Vec<_> = listed["tags"].as_array().unwrap().iter().map(|tag| tag["tag"].as_str().unwrap()).collect();
    assert_eq!(names, ["tench, Tinca tinca", "goldfish", "crane", "Crane, crane", "4"]);
    let near = server.get("/api/v1/vocabulary?near=godlfish").expect(200);
    assert_eq!(near["tags"], json!([{"tag": "goldfish", "count": null}]));
    let read = server.get("/api/v1/prompt?text=tinca%20tinca").expect(200);
    document().check_answer("/api/v1/prompt", "get", 200, &read);
    assert_eq!(read["tags"], json!([{"tag": "tench, Tinca tinca", "weight": 1.0}]));
    let asked = json!({"prompt": " goldfish, ", "negative_prompt": " 4", "cfg_scale": 2, "steps": 2, "seed": 0});
    let drawn = server.post("/sdapi/v1/txt2img", &asked).expect(200);
    let drawn = BASE64_STANDARD.decode(drawn["images"][0].as_str().unwrap()).unwrap();
    let arguments = "--model c.safetensors --class 1 --negative 4 --guidance 2 --steps 2 --class-names names.txt";
    assert!(vec![drawn] == place.sample(arguments, &[0]), "txt2img");
    for (wanted, message) in [
        (json!({"classes": ["5"]}), "class 5 of c, expected 0 to 4"),
        (json!({"classes": ["CRANE"]}), r#""CRANE" is the name of several classes: 2, 3"#),
        (json!({"classes": ["goldfisch"]}), r#"unknown class "goldfisch", did you mean "goldfish"?"#),
        (json!({"classes": ["x".repeat(10_000)]}), "unknown class"),
        (json!({"classes": ["x".repeat(20_000)]}), "20000 bytes of tags, expected 16384 at most"),
        (json!({"sampler": ["euler", 3, 0.002, 80, 7, 9]}), "sampler: invalid type: a list, expected an object"),
        (json!({"classes": ["random"], "per_condition": 0}), "per_condition is 0"),
        (json!({"classes": vec!["1"; 65]}), "65 classes, expected 64 at most"),
        (json!({"classes": ["random", "1"]}), r#"classes: "random" goes alone"#),
        (json!({"classes": ["random"], "per_condition": 2}), r#"classes: "random" goes alone"#),
        (json!({"classes": ["1"], "negative": "cat", "sampler": {"guidance": 2.0}}), "unknown class"),
        (json!({"tags": ["goldfish"]}), "c takes no tags"),
        (json!({"classes": ["1"], "model": "m"}), "m takes no classes"),
    ] {
        let said = server.post("/api/v1/generate", &wanted).expect(422);
        assert!(said["detail"].as_str().unwrap().contains(message), "{wanted}\nsaid: {said}\nexpected: {message}");
    }
    drop(server);
    let unnamed = place.serve("--model c.safetensors");
    let said = unnamed.post("/api/v1/generate", &json!({"classes": ["goldfish"]})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("there are no names of classes"), "{said}");
    let (fine, said) = place.edm2k("serve --device cpu --model m.safetensors --class-names names.txt");
    assert!(!fine && said.contains("names.txt: goes with none of the models"), "{said}");
}

#[test]
fn another_network_guides_the_models_that_it_goes_with() {
    let place = Place::new();
    of_classes(&place);
    // `g` is of five classes as `c` is, but not `o`; `u` takes no condition, and so guides both.
    for (guide, fits) in [("g", false), ("u", true)] {
        let server = place.serve(&format!("--model c.safetensors --model o.safetensors --gnet {guide}.safetensors"));
        let models = server.get("/api/v1/models").expect(200);
        document().check_answer("/api/v1/models", "get", 200, &models);
        assert_eq!([&models[0]["gnet"], &models[0]["guided"]], [&json!(format!("{guide}.safetensors")), &json!(true)]);
        assert_eq!(models[1]["gnet"].is_string(), fits, "{models}");
        for (guidance, arguments) in [(1.0, ""), (1.7, &*format!("--gnet {guide}.safetensors"))] {
            let wanted = json!({"classes": ["3"], "seeds": "4,5", "sampler": {"steps": 3, "guidance": guidance}});
            let job = server.post("/api/v1/generate?wait=true", &wanted).expect(200);
            let arguments = format!(
                "--model c.safetensors --class 3 --per-condition 2 --seeds 4,5 --steps 3 \
                 --guidance {guidance} {arguments}"
            );
            assert!(pictures(&job) == place.sample(&arguments, &[4, 5]), "{arguments}");
        }
        let wanted = json!({"classes": ["3"], "negative": "1", "sampler": {"steps": 2}});
        let answer = server.post("/api/v1/generate?wait=true", &wanted);
        if fits {
            let said = answer.expect(422);
            assert!(
                said["detail"].as_str().unwrap().contains("takes no condition, so a negative does nothing"),
                "{said}"
            );
        } else {
            let arguments = "--model c.safetensors --class 3 --negative 1 --steps 2 --gnet g.safetensors";
            assert!(pictures(&answer.expect(200)) == place.sample(arguments, &[0]));
        }
    }
    for (model, why) in
        [("o", "its conditions are 5 wide, those of o are 6 wide"), ("u", "it takes conditions, u none")]
    {
        let (fine, said) = place.edm2k(&format!("serve --device cpu --model {model}.safetensors --gnet g.safetensors"));
        assert!(
            !fine && said.contains(&format!("g.safetensors: goes with none of the models: g.safetensors: {why}")),
            "{said}"
        );
    }
    let (fine, said) = place.edm2k("sample --model u.safetensors --gnet g.safetensors --outdir out --device cpu");
    assert!(!fine && said.contains("--gnet: g.safetensors: it takes conditions, u.safetensors none"), "{said}");
}

#[test]
fn jobs_of_one_shape_share_batches_and_their_pictures_do_not_change() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors --batch 4");
    // Keeps the device busy until all others wait.
    let first = server.post("/api/v1/generate", &long()).expect(202);
    let ask = |tags: &str, seed: u64, steps: u64| json!({"tags": [tags], "seeds": seed.to_string(), "sampler": {"steps": steps}});
    let wanted = [ask("cat", 1, 5), ask("dog", 1, 5), ask("heart", 2, 6), ask("red", 3, 5), ask("cat, dog", 4, 5)];
    let jobs: Vec<u64> =
        wanted.iter().map(|job| server.post("/api/v1/generate", job).expect(202)["id"].as_u64().unwrap()).collect();
    let view = |id: u64| server.get(&format!("/api/v1/jobs/{id}")).expect(200);
    for (place, id) in jobs.iter().enumerate() {
        assert_eq!(view(*id)["ahead"], place + 1, "each sees its place");
    }
    let queue = server.get("/api/v1/jobs").expect(200);
    document().check_answer("/api/v1/jobs", "get", 200, &queue);
    assert_eq!(queue.as_array().unwrap().len(), 6);
    let cancelled = server.request("DELETE", &format!("/api/v1/jobs/{}", first["id"]), &[], b"").expect(200);
    assert_eq!(cancelled["stage"], "cancelled");
    for (id, wanted) in jobs.iter().zip(&wanted) {
        wait_until("a picture", || view(*id)["stage"] == "done");
        let file = server.get(&format!("/api/v1/jobs/{id}/pictures/0")).body;
        let (tags, seeds, steps) = (&wanted["tags"][0], &wanted["seeds"], &wanted["sampler"]["steps"]);
        let arguments = format!(
            "--model m.safetensors --tags |{}| --seeds {} --steps {steps}",
            tags.as_str().unwrap(),
            seeds.as_str().unwrap()
        );
        let seed = seeds.as_str().unwrap().parse().unwrap();
        assert!(file == place.sample(&arguments, &[seed])[0], "{wanted} differs");
    }
}

#[test]
fn events_show_previews_and_pictures_and_end() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors --batch 2");
    let wanted = json!({"tags": ["cat"], "seeds": "0-3", "sampler": {"steps": 200}});
    let job = server.post("/api/v1/generate", &wanted).expect(202);
    let events: Vec<Value> = server.events(&format!("/api/v1/jobs/{}/events", job["id"])).collect();
    events.iter().for_each(|event| document().check("Job", event));
    let last = events.last().unwrap();
    assert_eq!((&last["stage"], &last["done"]), (&json!("done"), &json!(800)));
    assert_eq!(last["pictures"].as_array().unwrap().len(), 4);
    let previews: BTreeSet<&str> = events
        .iter()
        .flat_map(|event| event["previews"].as_array().unwrap())
        .map(|p| p["image"].as_str().unwrap())
        .collect();
    assert!(previews.len() > 4, "{} different previews", previews.len());
    for preview in previews {
        let bytes = BASE64_STANDARD.decode(preview.strip_prefix("data:image/png;base64,").unwrap()).unwrap();
        let image = image::load_from_memory(&bytes).unwrap();
        assert_eq!((image.width(), image.height()), (16, 16));
    }
    let running = events.iter().find(|event| event["rate"].is_number()).unwrap();
    assert!(running["rate"].as_f64().unwrap() > 0.0 && running["seconds_left"].as_f64().unwrap() > 0.0);
    let done: Vec<u64> = events.iter().map(|event| event["done"].as_u64().unwrap()).collect();
    assert!(done.is_sorted(), "{done:?}");
}

#[test]
fn a_client_that_goes_away_cancels_its_job_and_the_next_one_runs() {
    let place = Place::new();
    // On no machine may the jobs end before the server's patience does.
    of_width(128, &place.path("slow.safetensors"), 3);
    let server = place.serve("--model slow.safetensors");
    // One that watches events, one that waits for the answer.
    let job = server.post("/api/v1/generate", &long()).expect(202);
    let mut events = server.events(&format!("/api/v1/jobs/{}/events", job["id"]));
    assert!(events.next().is_some());
    drop(events);
    let body = long().to_string();
    let headers = [("content-type", "application/json")];
    let mut waiting = TcpStream::connect(&server.address).unwrap();
    waiting
        .write_all(&message(&server.address, "POST", "/api/v1/generate?wait=true", &headers, body.as_bytes()))
        .unwrap();
    wait_until("the second job", || server.get("/api/v1/jobs").json().as_array().unwrap().len() == 2);
    drop(waiting);
    wait_until("an empty queue", || server.get("/api/v1/jobs").json().as_array().unwrap().is_empty());
    let gone = server.get(&format!("/api/v1/jobs/{}", job["id"])).expect(200);
    assert_eq!((&gone["stage"], &gone["why"]), (&json!("cancelled"), &json!("nobody waited for it any more")));
    assert!(gone["done"].as_u64().unwrap() < 4000, "it ran to its end");
    server.post("/api/v1/generate?wait=true", &json!({})).expect(200);
}

#[test]
fn what_cannot_be_drawn_is_refused_with_what_is_wrong() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    for (wanted, message) in [
        (json!({"tags": ["smilin face"]}), r#"unknown tag "smilin face", did you mean "smiling face"?"#),
        (json!({"tags": [" , "]}), "has no tag"),
        (json!({"tags": vec!["cat"; 65]}), "65 sets of tags, expected 64 at most"),
        (json!({"tags": ["cat".repeat(10_000)]}), "bytes of tags"),
        (json!({"tags": ["(".repeat(8000) + "cat" + &")".repeat(8000)]}), "more than 32 brackets around each other"),
        (json!({"tags": ["[".repeat(16_000)]}), "more than 32 brackets around each other"),
        (json!({"tags": ["cat"], "negative": ")".repeat(16_000)}), "more than 32 brackets around each other"),
        (json!({"tags": ["cat".repeat(5000)]}), "unknown tag"),
        (json!({"seeds": "5-1"}), "runs backwards"),
        (json!({"seeds": "0-64"}), "65 images, expected 64 at most"),
        (json!({"width": 17}), "17x16"),
        (json!({"width": 64, "height": 64}), "64x64 is more than 4 times m's 16x16"),
        (json!({"width": 18446744073709551615u64}), "18446744073709551615"),
        (json!({"seeds": "0-63", "sampler": {"steps": 100}}), "64 images of 100 steps are too much"),
        (
            json!({"tags": ["cat", "dog", "heart"], "seeds": "0"}),
            "too few seeds for 3 conditions, 1 of each: found 1, expected 3 at least",
        ),
        (json!({"tags": ["cat"], "negative": "dog", "sampler": {"guidance": 1.0}}), "does nothing at guidance 1"),
        (json!({"sampler": {"guidance_interval": [100, 200]}}), "expected one that holds a step's noise level"),
        (
            json!({"sampler": {"guidance": 1.0, "guidance_interval": [1, 20]}}),
            "guidance interval = 1,20, expected none at guidance 1",
        ),
        (json!({"sampler": {"strength": 0.25}}), "strength: there is no image to begin from"),
        (json!({"sampler": {"steps": 0}}), "steps = 0, expected 1 to 10000"),
        (json!({"sampler": {"solver": "ddim"}}), "unknown variant `ddim`"),
        (json!({"sampler": {"rho": "7"}}), r#"sampler: rho: invalid type: string "7", expected a number"#),
        (
            json!({"sampler": {"solver": "heun", "churn": []}}),
            "sampler: churn: invalid type: a list, expected an object",
        ),
        (json!({"sampler": {"rho": vec![7; 5000]}}), "sampler: more than 4096 bytes"),
        (json!({"width": null, "sampler": {"churn": {"s_churn": null}}, "wide": 1}), "unknown field `wide`"),
        (json!({"tags": ["cat", 7]}), "tags[1]: invalid type: integer `7`, expected a string"),
        (json!({"sampler": {"churn": {"s_churn": 3.0}}}), "0 with dpmpp_2m"),
        (json!({"invent": 3}), "m has no condition model"),
        (json!({"tags": ["cat"], "complete": true}), "m has no condition model"),
        (json!({"like": ["aGVsbG8="]}), "m takes no pictures"),
        (json!({"steps": 3}), "unknown field `steps`"),
        (json!([1]), "expected an object"),
        (json!({"outdir": "/tmp"}), "unknown field `outdir`"),
    ] {
        let answer = server.post("/api/v1/generate", &wanted);
        let said = answer.expect(422);
        assert!(said["detail"].as_str().unwrap().contains(message), "{wanted}\nsaid: {said}\nexpected: {message}");
        document().check("Error", &said);
    }
    // What the framework refuses has the same form.
    for (path, described, status, message) in [
        ("/api/v1/jobs/abc", "/api/v1/jobs/{id}", 404, "there is no job abc, or no more"),
        ("/api/v1/prompt", "/api/v1/prompt", 422, "behind ?: missing field `text`"),
        (
            "/api/v1/prompt?text=cat&mdoel=m",
            "/api/v1/prompt",
            422,
            "behind ?: mdoel: unknown field `mdoel`, expected `model` or `text`",
        ),
        (
            "/sdapi/v1/progress?skip_current_image=no",
            "/sdapi/v1/progress",
            422,
            "behind ?: skip_current_image: \"no\", expected true or false",
        ),
    ] {
        let said = server.get(path).expect(status);
        assert_eq!(said["detail"], message, "{path}");
        document().check_answer(described, "get", status, &said);
    }
    let said = server.post("/api/v1/generate?wiat=true", &json!({})).expect(422);
    assert_eq!(said["detail"], "behind ?: wiat: unknown field `wiat`, expected `wait`");
    server.post("/api/v1/generate?wait=True", &json!({"sampler": {"steps": 1}})).expect(200);
    for model in ["n", "../m", "/etc/passwd", "m.safetensors", ""] {
        let said = server.post("/api/v1/generate", &json!({"model": model})).expect(404);
        assert!(said["detail"].as_str().unwrap().starts_with("there is no model"), "{said}");
    }
}

/// Where there are taggers.
#[cfg(feature = "onnx")]
#[test]
fn pictures_are_uploaded_to_draw_others_like_them_but_no_bombs() {
    use edm2k::condition::Conditioning;
    let place = Place::new();
    fs::write(place.path("tagger.onnx"), onnx::Tagger::new(16, 24).file()).unwrap();
    let config: Config = serde_json::from_str(
        r#"{"img_resolution": 16, "img_channels": 3, "label_dim": 24, "model_channels": 16, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16}"#,
    )
    .unwrap();
    server::write(&config, &place.path("features.safetensors"), 1, |model| {
        let (source, node) = ("tagger.onnx".into(), String::new());
        model.meta.conditioning = Conditioning::Features { source, node, fingerprint: None };
    });
    let drawing = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([6 * x as u8, 8 * y as u8, (x * y) as u8]));
    drawing.save(place.path("drawing.png")).unwrap();
    let server = place.serve("--model features.safetensors --tagger tagger.onnx");
    let upload = BASE64_STANDARD.encode(fs::read(place.path("drawing.png")).unwrap());
    let ours = server.post("/api/v1/generate?wait=true", &json!({"like": [upload], "seeds": "5"})).expect(200);
    let url = format!("data:image/png;base64,{upload}");
    let same = server.post("/api/v1/generate?wait=true", &json!({"like": [url], "seeds": "5"})).expect(200);
    let theirs =
        place.sample("--model features.safetensors --tagger tagger.onnx --like drawing.png --seeds 5", &[5]).remove(0);
    // The files differ in what the picture was called.
    let pixels = |bytes: &[u8]| image::load_from_memory(bytes).unwrap().into_rgb8();
    assert_eq!(pixels(&pictures(&ours)[0]), pixels(&theirs));
    assert_eq!(pixels(&pictures(&same)[0]), pixels(&theirs));

    for (bytes, message) in [
        (&b"hello"[..], "a picture: "),
        (&bomb(60_000, 60_000), "a picture of 60000x60000, expected 16777216 pixels at most"),
    ] {
        let said = server.post("/api/v1/generate", &json!({"like": [BASE64_STANDARD.encode(bytes)]})).expect(422);
        assert!(said["detail"].as_str().unwrap().contains(message), "{said}");
    }
    let said = server.post("/api/v1/generate", &json!({"like": ["?"]})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("a picture: "), "{said}");
    // What only decoding shows is refused before it is taken, too.
    let cut = &fs::read(place.path("drawing.png")).unwrap()[..200];
    let said = server.post("/api/v1/generate?wait=true", &json!({"like": [BASE64_STANDARD.encode(cut)]})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("a picture: "), "{said}");
    server.post("/api/v1/generate?wait=true", &json!({})).expect(200);
}

/// A small PNG that says to be large.
#[cfg(feature = "onnx")]
fn bomb(width: u32, height: u32) -> Vec<u8> {
    let chunk = |kind: &[u8], data: &[u8]| {
        let both = [kind, data].concat();
        let (length, sum) = ((data.len() as u32).to_be_bytes(), crc32fast::hash(&both).to_be_bytes());
        [&length[..], &both, &sum].concat()
    };
    let head = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &head),
        chunk(b"IDAT", &[0x78, 0x9c, 3, 0, 0, 0, 0, 1]),
        chunk(b"IEND", b""),
    ]
    .concat()
}

#[test]
fn hostile_requests_get_a_clear_status_and_the_server_goes_on() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    let json_type = ("content-type", "application/json");
    let body = br#"{"seeds": "0"}"#;
    let rebound = format!("evil.example:{}", server.address.rsplit(':').next().unwrap());
    for (headers, status) in [
        (vec![json_type, ("host", rebound.as_str())], 403),
        (vec![json_type, ("host", "")], 403),
        (vec![json_type, ("origin", "https://evil.example")], 403),
        (vec![json_type, ("origin", "null")], 403),
        (vec![json_type, ("sec-fetch-site", "cross-site")], 403),
        (vec![("content-type", "text/plain")], 415),
        (vec![("content-type", "application/x-www-form-urlencoded")], 415),
        (vec![], 415),
    ] {
        let answer = server.request("POST", "/api/v1/generate", &headers, body);
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.text());
        assert!(answer.json()["detail"].is_string());
        assert!(server.get("/api/v1/jobs").json().as_array().unwrap().is_empty(), "{headers:?} began something");
    }
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], 403),
        (b"hello\r\n\r\n", 400),
        (b"GET /%00 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        (b"GET /api/v1/runs/..%2f..%2fetc HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        (b"GET /api/v1/jobs/99999999999999999999 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
        (b"DELETE / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 405),
        (b"POST /api/v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: x\r\n\r\n", 400),
    ] {
        let answer = server.raw(request).unwrap_or_else(|| panic!("{:?}: no answer", String::from_utf8_lossy(request)));
        assert_eq!(answer.status, status, "{:?}: {}", String::from_utf8_lossy(request), answer.text());
    }
    let endless = [b"GET / HTTP/1.1\r\nhost: localhost\r\nx: ", &[b'a'; 200_000][..]].concat();
    // It is cut off, and its answer may be lost with the connection.
    assert!(server.raw(&endless).is_none_or(|answer| answer.status == 431), "a head without end");
    let large = vec![b' '; 100 << 20];
    let said = message(&server.address, "POST", "/api/v1/generate", &[json_type], &large);
    assert_eq!(server.raw(&said).unwrap().status, 413);
    let mut chunked = b"POST /api/v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\n\r\n6400000\r\n"
        .to_vec();
    chunked.extend_from_slice(&large);
    chunked.extend_from_slice(b"\r\n0\r\n\r\n");
    assert_eq!(server.raw(&chunked).unwrap().status, 413);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(server.request("POST", "/api/v1/generate", &[json_type], deep.as_bytes()).status, 422);

    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'; script-src 'self';"));
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
    server.post("/api/v1/generate?wait=true", &json!({})).expect(200);
    let resident = memory(server.pid());
    assert!(resident < 300.0, "{resident} MiB after that");
}

#[test]
fn half_open_connections_are_closed_and_hold_nobody_up() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    let begin = |text: &[u8]| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(text).unwrap();
        stream
    };
    let heads: Vec<TcpStream> =
        (0..150).map(|i| begin(if i % 2 == 0 { b"" } else { b"GET / HTTP/1.1\r\nhost: lo" })).collect();
    let mut body = begin(
        b"POST /api/v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
        content-length: 100\r\nconnection: close\r\n\r\n{\"seeds\"",
    );
    server.post("/api/v1/generate?wait=true", &json!({})).expect(200);
    let started = Instant::now();
    for mut head in heads {
        let mut rest = Vec::new();
        let _ = head.read_to_end(&mut rest);
        assert!(started.elapsed() < Duration::from_secs(20), "a head that never comes is waited for");
    }
    let mut answer = String::new();
    body.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[test]
fn two_hundred_clients_at_once_are_all_answered() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors --batch 16");
    let expected = place.sample("--model m.safetensors --seeds 0-9 --steps 2", &(0..10).collect::<Vec<_>>());
    thread::scope(|scope| {
        let clients: Vec<_> = (0..200usize)
            .map(|i| {
                let (server, expected) = (&server, &expected);
                scope.spawn(move || {
                    let wanted = json!({"seeds": (i % 10).to_string(), "sampler": {"steps": 2}});
                    let answer = server.post("/api/v1/generate?wait=true", &wanted).expect(200);
                    assert!(pictures(&answer)[0] == expected[i % 10], "client {i} got another picture");
                })
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
}

#[test]
fn a_queue_that_is_full_says_so() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    let answers: Vec<_> = (0..260).map(|_| server.post("/api/v1/generate", &long())).collect();
    assert_eq!(answers.iter().filter(|answer| answer.status == 202).count(), 256);
    let full = answers.last().unwrap();
    assert_eq!((full.status, full.header("retry-after")), (429, Some("5")));
    assert_eq!(full.json()["detail"], "256 jobs are waiting already; try again later");
}

/// Resident memory of a process, in MiB.
fn memory(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<f64>().unwrap() / 1024.0
}

/// Runs jobs one after the other; memory at the beginning, when all that is kept has filled up, and at the end.
fn memory_over(jobs: usize) -> [f64; 3] {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    let run = |count: usize| {
        for i in 0..count {
            let wanted = json!({"tags": ["cat"], "seeds": i.to_string(), "sampler": {"steps": 1}});
            server.post("/api/v1/generate?wait=true", &wanted).expect(200);
        }
        memory(server.pid())
    };
    [run(1), run(299), run(jobs - 300)]
}

#[test]
fn memory_stays_flat_over_jobs() {
    let [begin, filled, end] = memory_over(500);
    println!("{begin:.1} MiB after 1 job, {filled:.1} after 300, {end:.1} after 500");
    // The last 256 jobs are kept; beyond, nothing grows.
    assert!(end < filled + 3.0, "{filled} MiB after 300 jobs, {end} after 500");
}

#[test]
#[ignore = "takes a while; for docs/measured.md"]
fn memory_stays_flat_over_a_thousand_jobs() {
    let [begin, filled, end] = memory_over(1000);
    println!("{begin:.1} MiB after 1 job, {filled:.1} after 300, {end:.1} after 1000");
    assert!(end < filled + 5.0, "{filled} MiB after 300 jobs, {end} after 1000");
}

/// Figures of docs/measured.md, on the demo's model.
#[test]
#[ignore = "measures"]
fn speed_of_the_queue() {
    let place = Place::new();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/emoji.safetensors").display().to_string();
    let server = Server::start(place.dir(), &["--model", &demo]);
    let ask = |seed: usize, steps: usize| {
        let wanted = json!({"tags": ["red, heart"], "seeds": seed.to_string(), "sampler": {"steps": steps}});
        server.post("/api/v1/generate?wait=true", &wanted).expect(200);
    };
    ask(0, 1);
    for (clients, steps) in [(1, 1), (16, 1), (1, 16), (16, 16)] {
        let (each, started) = (if steps == 1 { 48 } else { 16 } / clients, Instant::now());
        thread::scope(|scope| {
            (0..clients).for_each(|client| drop(scope.spawn(move || (0..each).for_each(|i| ask(client + i, steps)))));
        });
        let rate = (clients * each) as f64 / started.elapsed().as_secs_f64();
        println!("{clients} clients, pictures of {steps} steps: {rate:.2} requests a second");
    }
    let median = |mut seconds: Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    };
    let served = (0..9).map(|seed| {
        let started = Instant::now();
        ask(seed, 16);
        started.elapsed().as_secs_f64()
    });
    let served = median(served.collect());
    let mut pipeline = Pipeline::load(&Device::open("cpu").unwrap().fastest(), &demo).unwrap();
    let conditions = vec![pipeline.tags("red, heart", 0).unwrap()];
    pipeline.ready().unwrap();
    let sampled = (0..9).map(|seed| {
        let started = Instant::now();
        let request = Request { conditions: conditions.clone(), seeds: vec![seed], ..Request::default() };
        pipeline.generate(&request).unwrap()[0].png().unwrap();
        started.elapsed().as_secs_f64()
    });
    let sampled = median(sampled.collect());
    println!("a picture of 16 steps: {served:.4} s served, {sampled:.4} s in a program of its own, without its start");
}

#[test]
fn other_machines_need_a_token() {
    let place = Place::new();
    let (fine, said) = place.edm2k("serve --model m.safetensors --device cpu --listen 0.0.0.0:0");
    assert!(!fine && said.contains("needs a --token of 16 characters at least"), "{said}");
    let (fine, said) = place.edm2k("serve --model m.safetensors --device cpu --listen 127.0.0.1:0 --token short");
    assert!(!fine && said.contains("the token has 5 characters, expected 16 at least"), "{said}");

    let token = "correct-horse-battery";
    let server = place.serve(&format!("--model m.safetensors --token {token}"));
    let ask = |headers: &[(&str, &str)]| server.request("GET", "/api/v1/models", headers, b"").status;
    assert_eq!(server.get("/").status, 200, "the page asks for the token");
    assert_eq!(ask(&[]), 401);
    assert_eq!(server.get("/api/v1/models").header("www-authenticate"), Some("Bearer"));
    assert_eq!(ask(&[("authorization", "Bearer correct-horse-batterz")]), 401);
    assert_eq!(ask(&[("authorization", &format!("Bearer {token}"))]), 200);
    let basic = format!("Basic {}", BASE64_STANDARD.encode(format!("anybody:{token}")));
    assert_eq!(ask(&[("authorization", &basic)]), 200, "as clients of A1111 do");
    assert_eq!(server.post("/sdapi/v1/txt2img", &json!({})).status, 401);
    assert_eq!(server.post("/api/v1/session", &json!({"token": "wrong"})).status, 401);
    let session = server.post("/api/v1/session", &json!({"token": token}));
    assert_eq!(session.status, 204);
    let cookie = session.header("set-cookie").unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict") && !cookie.contains(token), "{cookie}");
    assert_eq!(ask(&[("cookie", cookie.split(';').next().unwrap())]), 200);
}

#[test]
fn clients_of_a1111_are_served() {
    let place = Place::new();
    tiny(&place.path("n.safetensors"), 4);
    let server = place.serve("--model m.safetensors --model n.safetensors");
    let get = |path: &str| {
        let answer = server.get(path).expect(200);
        document().check_answer(path, "get", 200, &answer);
        answer
    };
    assert_eq!(get("/sdapi/v1/sd-models")[1]["title"], "n");
    assert_eq!(get("/sdapi/v1/samplers")[0]["name"], "DPM++ 2M");
    assert_eq!(get("/sdapi/v1/options")["sd_model_checkpoint"], "m");
    assert_eq!(get("/sdapi/v1/progress")["progress"], 0.0);
    // What a client sends: all that it knows of.
    let wanted = json!({
        "prompt": "cat, red", "prompt_2": "x", "negative_prompt": "(dog:1.2)", "seed": 5, "subseed": -1, "steps": 3, "cfg_scale": 2,
        "width": 16, "height": 16, "batch_size": 2, "n_iter": 1, "sampler_name": "Heun", "styles": [], "tiling": false,
        "override_settings": {"sd_model_checkpoint": "n", "CLIP_stop_at_last_layers": 1}, "enable_hr": false,
    });
    let answer = server.post("/sdapi/v1/txt2img", &wanted).expect(200);
    document().check_answer("/sdapi/v1/txt2img", "post", 200, &answer);
    let ours = answer["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| BASE64_STANDARD.decode(image.as_str().unwrap()).unwrap());
    let arguments = "--model n.safetensors --tags |cat, red| --seeds 5-6 --steps 3 --guidance 2 --solver heun --per-condition 2 \
         --negative |(dog:1.2)|";
    assert!(ours.eq(place.sample(arguments, &[5, 6])), "pictures of txt2img are not those of edm2k sample");
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["all_seeds"], json!([5, 6]));
    assert_eq!(info["ignored"], json!(["prompt_2", "subseed", "override_settings.CLIP_stop_at_last_layers"]));
    let infotexts = info["infotexts"].as_array().unwrap();
    assert_eq!(infotexts.len(), 2);
    let expected = "cat, red\nNegative prompt: (dog:1.2)\nSteps: 3, Sampler: Heun, Schedule type: Karras, CFG scale: 2.0, \
                    Seed: 6, Size: 16x16, Model: n, Version: edm2k ";
    assert!(infotexts[1].as_str().unwrap().starts_with(expected), "{infotexts:?}");

    for name in ["m", "n.safetensors"] {
        assert_eq!(server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": name})).status, 200);
    }
    assert_eq!(get("/sdapi/v1/options")["sd_model_checkpoint"], "n");
    assert_eq!(server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": "/etc/passwd"})).status, 404);
    let nothing = json!({"prompt": null, "negative_prompt": null, "seed": null, "steps": 2, "override_settings": null, "send_images": false});
    assert_eq!(server.post("/sdapi/v1/txt2img", &nothing).expect(200)["images"], json!([]));
    // Some clients always send the negative prompt that they keep.
    let unguided = json!({"prompt": "cat", "negative_prompt": "dog", "steps": 1, "cfg_scale": 1});
    let said = server.post("/sdapi/v1/txt2img", &unguided).expect(200);
    let info: Value = serde_json::from_str(said["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["ignored"], json!(["negative_prompt"]));
    let said = server.post("/sdapi/v1/txt2img", &json!({"prompt": "masterpiece"})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("unknown tag \"masterpiece\""), "{said}");
    let said = server.post("/sdapi/v1/txt2img", &json!({"negative_prompt": "(blurry:1.4)"})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("unknown tag \"blurry\""), "{said}");
    let said = server.post("/sdapi/v1/txt2img", &json!({"sampler_name": "DDIM"})).expect(422);
    assert!(said["detail"].as_str().unwrap().contains("expected one of DPM++ 2M, Heun, Euler"), "{said}");

    thread::scope(|scope| {
        let waiting = scope.spawn(|| server.post("/sdapi/v1/txt2img", &json!({"steps": 600, "batch_size": 6})));
        wait_until("a preview", || get("/sdapi/v1/progress")["current_image"].is_string());
        let shown = get("/sdapi/v1/progress");
        assert_eq!(shown["state"]["sampling_steps"], 600);
        assert!(BASE64_STANDARD.decode(shown["current_image"].as_str().unwrap()).unwrap().starts_with(b"\x89PNG"));
        // The server makes four at a time.
        wait_until("pictures", || get("/sdapi/v1/progress")["state"]["job_no"] == 4);
        assert_eq!(server.request("POST", "/sdapi/v1/interrupt", &[], b"").status, 200);
        let said = waiting.join().unwrap().expect(200);
        let info: Value = serde_json::from_str(said["info"].as_str().unwrap()).unwrap();
        assert_eq!((said["images"].as_array().unwrap().len(), info["all_seeds"].as_array().unwrap().len()), (4, 4));
    });
}

#[test]
fn a_prompt_is_read_as_it_will_be_drawn() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors");
    let get = |text: &str| {
        let answer = server.get(&format!("/api/v1/prompt?text={text}"));
        document().check_answer("/api/v1/prompt", "get", answer.status, &answer.json());
        answer
    };
    let read = get("((cat,%20dog:1.5)),%20red").expect(200);
    let tags = json!([{"tag": "cat", "weight": 1.65}, {"tag": "dog", "weight": 1.65}, {"tag": "red", "weight": 1.0}]);
    let rounded = |read: &Value| -> Vec<i64> {
        let weight = |tag: &Value| (100.0 * tag["weight"].as_f64().unwrap()).round() as i64;
        read.as_array().unwrap().iter().map(weight).collect()
    };
    assert_eq!(rounded(&read["tags"]), rounded(&tags));
    assert_eq!(read["tags"][1]["tag"], "dog");
    let said = get("(haert:2)").expect(422);
    assert!(said["detail"].as_str().unwrap().contains("unknown tag \"haert\", did you mean \"heart\"?"), "{said}");
    assert!(get("(cat").expect(422)["detail"].as_str().unwrap().contains("has no partner"));
}

#[test]
fn models_and_vocabularies_are_described() {
    let place = Place::new();
    always(&place);
    let server = place.serve("--model m.safetensors --model always.safetensors");
    for path in ["/api/v1/server", "/api/v1/models", "/api/v1/vocabulary", "/api/v1/jobs", "/api/v1/openapi.json"] {
        let answer = server.get(path).expect(200);
        document().check_answer(path, "get", 200, &answer);
    }
    let models = server.get("/api/v1/models").expect(200);
    assert_eq!([&models[0]["guided"], &models[1]["guided"]], [true, false]);
    let drawn = server.post(
        "/sdapi/v1/txt2img",
        &json!({"prompt": "cat", "steps": 2, "seed": 1,
        "override_settings": {"sd_model_checkpoint": "always"}}),
    );
    assert_eq!(drawn.expect(200)["parameters"]["cfg_scale"], 1.0);
    let near = server.get("/api/v1/vocabulary?near=smilin%20fac").expect(200);
    assert_eq!(near["tags"], json!([{"tag": "smiling face", "count": null}]));
    assert_eq!(server.get("/api/v1/runs").status, 404, "without --runs");
}

#[test]
fn runs_are_shown_while_they_go_and_their_snapshots_draw() {
    let place = Place::new();
    fs::create_dir_all(place.path("runs/mine")).unwrap();
    fs::create_dir_all(place.path("runs/no run")).unwrap();
    let line = |nimg: u64, loss: f64| {
        json!({"nimg": nimg, "step": nimg / 64, "loss": loss, "lr": 0.01, "grad_norm": 1.0, "nonfinite": 0,
            "images_per_s": 50.0, "seconds": nimg as f64 / 50.0, "peak_mib": 100.0})
    };
    let stats = place.path("runs/mine/stats.jsonl");
    fs::write(&stats, format!("{}\n{}\n{{\"nimg\":3", line(64, 0.9), json!({"nimg": 64, "validation_loss": 0.95})))
        .unwrap();
    image::RgbImage::new(8, 8).save(place.path("runs/mine/grid-000000064.png")).unwrap();
    tiny(&place.path("runs/mine/snapshot-000000064-0.100.safetensors"), 8);
    std::os::unix::fs::symlink(place.path("m.safetensors"), place.path("runs/mine/grid-000000128.png")).unwrap();
    let server = place.serve("--model m.safetensors --runs runs");
    let get = |path: &str, described: &str| {
        let answer = server.get(path).expect(200);
        document().check_answer(described, "get", 200, &answer);
        answer
    };
    let runs = get("/api/v1/runs", "/api/v1/runs");
    assert_eq!(runs.as_array().unwrap().len(), 1);
    assert_eq!(
        (&runs[0]["name"], &runs[0]["loss"], &runs[0]["validation_loss"]),
        (&json!("mine"), &json!(0.9), &json!(0.95))
    );
    assert_eq!(runs[0]["running"], true);
    let stats_path = "/api/v1/runs/{run}/stats";
    let part = get("/api/v1/runs/mine/stats", stats_path);
    assert_eq!(part["points"].as_array().unwrap().len(), 2, "a line that is cut off is none yet");
    let mut file = fs::OpenOptions::new().append(true).open(&stats).unwrap();
    write!(file, "00}}\n{}\n", line(640, 0.5)).unwrap();
    let next = get(&format!("/api/v1/runs/mine/stats?from={}", part["next"]), stats_path);
    assert_eq!(next["points"].as_array().unwrap().len(), 2);
    assert_eq!(next["points"][1]["loss"], 0.5);
    assert_eq!(get("/api/v1/runs/mine", "/api/v1/runs/{run}")["nimg"], 640);
    fs::write(&stats, format!("{}\n", line(64, 0.9))).unwrap();
    let anew = get(&format!("/api/v1/runs/mine/stats?from={}", next["next"]), stats_path);
    assert_eq!(
        (&anew["anew"], anew["points"].as_array().unwrap().len()),
        (&json!(true), 1),
        "a run that was taken back"
    );

    let grid = server.get("/api/v1/runs/mine/grids/grid-000000064.png");
    assert_eq!((grid.status, grid.header("content-type")), (200, Some("image/png")));
    for path in [
        "mine/grids/stats.jsonl",
        "mine/grids/grid-000000128.png",
        "mine/grids/..%2F..%2Fm.safetensors",
        "..",
        "no%20run",
        "mine/grids/..",
    ] {
        assert_eq!(server.get(&format!("/api/v1/runs/{path}")).status, 404, "{path}");
    }
    let model = runs[0]["snapshots"][0]["model"].as_str().unwrap();
    let job =
        server.post("/api/v1/generate?wait=true", &json!({"model": model, "tags": ["cat"], "seeds": "3"})).expect(200);
    let file = "runs/mine/snapshot-000000064-0.100.safetensors";
    assert!(pictures(&job) == place.sample(&format!("--model {file} --tags cat --seeds 3"), &[3]));

    // A run that begins anew writes others of the same names.
    let draw = || server.post("/api/v1/generate?wait=true", &json!({"model": model, "tags": ["cat"], "seeds": "3"}));
    tiny(&place.path(file), 9);
    let anew = pictures(&draw().expect(200));
    assert!(anew == place.sample(&format!("--model {file} --tags cat --seeds 3"), &[3]) && anew != pictures(&job));
    let whole = fs::read(place.path(file)).unwrap();
    fs::write(place.path(file), &whole[..whole.len() - 1]).unwrap();
    let said = draw().expect(500)["detail"].to_string();
    assert!(said.contains("mine/snapshot-000000064-0.100: ") && !said.contains("runs/mine"), "{said}");
}

#[test]
fn latents_are_previewed_by_a_fitted_map_or_a_taesd() {
    let place = Place::new();
    autoencoder::write(&place.path("vae.safetensors"), &autoencoder::sd_vae(&[32, 32], 1));
    autoencoder::write(&place.path("taesd.safetensors"), &autoencoder::taesd(8));
    let config: Config = serde_json::from_str(
        r#"{"img_resolution": 16, "img_channels": 4, "label_dim": 0, "model_channels": 16, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16}"#,
    )
    .unwrap();
    server::write(&config, &place.path("latents.safetensors"), 1, |_| {});
    let (fine, said) = place.edm2k("serve --model latents.safetensors --device cpu --listen 127.0.0.1:0");
    assert!(!fine && said.contains("latents.safetensors: its images are latents, which need an autoencoder"), "{said}");
    let (fine, said) =
        place.edm2k("serve --model m.safetensors --vae vae.safetensors --device cpu --listen 127.0.0.1:0");
    assert!(!fine && said.contains("vae.safetensors: goes with none of the models"), "{said}");
    let mut seen = Vec::new();
    for (preview, side) in [("", 16), ("--preview taesd.safetensors", 128)] {
        let server = place.serve(&format!("--model latents.safetensors --vae vae.safetensors {preview}"));
        let job = server.post("/api/v1/generate", &json!({"seeds": "1", "sampler": {"steps": 400}})).expect(202);
        let events: Vec<Value> = server.events(&format!("/api/v1/jobs/{}/events", job["id"])).collect();
        let shown = events.iter().rev().find_map(|event| event["previews"][0]["image"].as_str()).unwrap();
        let shown = BASE64_STANDARD.decode(shown.split_once(',').unwrap().1).unwrap();
        let shown = image::load_from_memory(&shown).unwrap();
        assert_eq!((shown.width(), shown.height()), (side, side));
        seen.push(server.get(&format!("/api/v1/jobs/{}/pictures/0", job["id"])).body);
    }
    let expected =
        place.sample("--model latents.safetensors --vae vae.safetensors --seeds 1 --steps 400", &[1]).remove(0);
    assert!(seen.iter().all(|file| *file == expected));
}

#[test]
fn a_stop_ends_what_runs_and_tells_those_who_wait() {
    let place = Place::new();
    let server = place.serve("--model m.safetensors --outdir kept");
    let job = server.post("/api/v1/generate?wait=true", &json!({"seeds": "12"})).expect(200);
    assert!(fs::read(place.path("kept/000001-000012.png")).unwrap() == pictures(&job)[0]);
    let (fine, said) = place.edm2k("serve --model m.safetensors --device cpu --listen 127.0.0.1:0 --outdir kept");
    assert!(!fine && said.ends_with("kept: another run is writing here\n"), "{said}");
    let address = server.address.clone();
    let waiting = thread::spawn(move || {
        let mut stream = TcpStream::connect(&address).unwrap();
        let headers = [("content-type", "application/json")];
        let body = long().to_string();
        stream.write_all(&message(&address, "POST", "/api/v1/generate?wait=true", &headers, body.as_bytes())).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    wait_until("the job", || !server.get("/api/v1/jobs").json().as_array().unwrap().is_empty());
    let started = Instant::now();
    let status = server.stop();
    assert!(status.success(), "{status}");
    assert!(started.elapsed() < Duration::from_secs(5), "it took {:?} to stop", started.elapsed());
    let answer = waiting.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("the server stopped"), "{answer}");
    // Numbers go on, so that nothing is replaced. One that no job can have does not count.
    fs::write(place.path("kept/18446744073709551615-1.png"), "mine").unwrap();
    let server = place.serve("--model m.safetensors --outdir kept");
    assert_eq!(server.post("/api/v1/generate", &json!({})).expect(202)["id"], 2);
    // A picture that cannot be written says so.
    fs::write(place.path("kept/000003-000007.png"), "mine").unwrap();
    let job = server.post("/api/v1/generate?wait=true", &json!({"seeds": "7-8"})).expect(200);
    let unwritten = |index: usize| job["pictures"][index]["unwritten"].as_str();
    assert!(unwritten(0).unwrap().starts_with("000003-000007.png: "), "{job}");
    assert_eq!((unwritten(1), fs::read(place.path("kept/000003-000007.png")).unwrap()), (None, b"mine".to_vec()));
    document().check_answer("/api/v1/generate", "post", 200, &job);
}

#[test]
fn the_examples_of_the_guide_run() {
    let guide = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/serve.md")).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let place = Place::new();
    fs::create_dir_all(place.path("runs/mine")).unwrap();
    fs::write(place.path("runs/mine/stats.jsonl"), "{\"nimg\":64,\"loss\":0.5}\n").unwrap();
    let [model, conditions] =
        ["emoji.safetensors", "conditions.safetensors"].map(|name| demo.join(name).display().to_string());
    let arguments = ["--model", &model, "--condition-model", &conditions, "--runs", "runs"];
    let server = Server::start(place.dir(), &arguments);
    let blocks = guide.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let examples: Vec<&str> = blocks.filter(|block| block.contains("curl")).collect();
    assert!(examples.len() >= 5, "docs/serve.md has {} examples", examples.len());
    for example in examples {
        let script = example.replace("localhost:7860", &server.address);
        let output =
            Command::new("bash").args(["-euo", "pipefail", "-c", &script]).current_dir(place.dir()).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && !out.contains("\"detail\""), "{script}\n{out}\n{err}");
    }
    assert!(fs::read(place.path("heart.png")).unwrap().starts_with(b"\x89PNG"));
}

/// The description of the API.
struct Document(Value);

fn document() -> Document {
    Document(serde_json::from_str(include_str!("../../src/serve/openapi.json")).unwrap())
}

/// Keywords of a schema that [`Document::fits`] looks at.
const CHECKED: [&str; 12] = [
    "$ref",
    "type",
    "enum",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "prefixItems",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
];
/// Those that describe.
const DESCRIBING: [&str; 4] = ["description", "default", "contentEncoding", "contentMediaType"];

impl Document {
    fn resolve<'a>(&'a self, value: &'a Value) -> &'a Value {
        match value["$ref"].as_str() {
            Some(place) => {
                self.0.pointer(place.strip_prefix('#').unwrap()).unwrap_or_else(|| panic!("{place}: nothing is there"))
            }
            None => value,
        }
    }

    /// How a value does not fit a schema.
    fn fits(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let schema = self.resolve(schema);
        let wrong = |what: &str| Err(format!("{at}: {what}: {value} for {schema}"));
        let is = |kind: &Value| match kind.as_str().unwrap() {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            "integer" => value.is_u64() || value.is_i64(),
            "number" => value.is_number(),
            other => panic!("type {other}"),
        };
        match &schema["type"] {
            Value::Array(kinds) if !kinds.iter().any(is) => return wrong("type"),
            kind @ Value::String(_) if !is(kind) => return wrong("type"),
            _ => {}
        }
        if schema["enum"].as_array().is_some_and(|all| !all.contains(value)) {
            return wrong("enum");
        }
        let number = value.as_f64().unwrap_or(0.0);
        if schema["minimum"].as_f64().is_some_and(|least| number < least)
            || schema["maximum"].as_f64().is_some_and(|most| number > most)
        {
            return wrong("range");
        }
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            let of = if schema["items"].is_object() { &schema["items"] } else { &schema["prefixItems"][index] };
            self.fits(of, item, &format!("{at}/{index}"))?;
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            if value.get(name.as_str().unwrap()).is_none() {
                return wrong(&format!("{name} is missing"));
            }
        }
        for (name, part) in value.as_object().into_iter().flatten() {
            match schema["properties"].get(name) {
                Some(of) => self.fits(of, part, &format!("{at}/{name}"))?,
                None if schema["additionalProperties"] == false => return wrong(&format!("{name} is not described")),
                None => {}
            }
        }
        Ok(())
    }

    fn check(&self, schema: &str, value: &Value) {
        self.fits(&self.0["components"]["schemas"][schema], value, schema).unwrap();
    }

    /// Checks an answer of an operation.
    fn check_answer(&self, path: &str, method: &str, status: u16, value: &Value) {
        let answer = self.resolve(&self.0["paths"][path][method]["responses"][status.to_string()]);
        self.fits(&answer["content"]["application/json"]["schema"], value, &format!("{method} {path}")).unwrap();
    }
}

/// The page takes its own from there.
#[test]
fn the_document_has_the_defaults_of_sampling() {
    let (document, usual) = (document(), SamplerConfig::default());
    let defaults = |properties: &Value| -> serde_json::Map<String, Value> {
        let all = properties.as_object().unwrap().iter();
        all.filter_map(|(key, property)| Some((key.clone(), property.get("default")?.clone()))).collect()
    };
    let said = defaults(&document.0["components"]["schemas"]["Sampler"]["properties"]);
    let named: BTreeSet<&str> = said.keys().map(String::as_str).collect();
    assert_eq!(named, ["guidance", "rho", "sigma_max", "sigma_min", "solver", "steps", "strength"].into());
    assert_eq!(serde_json::from_value::<SamplerConfig>(said.into()).unwrap(), usual);
    let body = document.0.pointer("/paths/~1sdapi~1v1~1txt2img/post/requestBody/content/application~1json/schema");
    let said = defaults(&body.unwrap()["properties"]);
    assert_eq!((&said["steps"], &said["cfg_scale"]), (&json!(usual.steps), &json!(usual.guidance)));
}

#[test]
fn the_document_is_one() {
    let document = document();
    assert_eq!(document.0["openapi"], "3.1.0");
    assert!(document.0["info"]["title"].is_string() && document.0["info"]["version"].is_string());
    let mut ids = BTreeSet::new();
    for (path, item) in document.0["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let at = format!("{method} {path}");
            assert!(
                ids.insert(operation["operationId"].as_str().unwrap().to_owned()),
                "{at}: its operationId is another's too"
            );
            assert!(operation["summary"].is_string(), "{at}");
            let parameters = || operation["parameters"].as_array().into_iter().flatten();
            let declared: BTreeSet<&str> =
                parameters().filter(|p| p["in"] == "path").map(|p| p["name"].as_str().unwrap()).collect();
            let named: BTreeSet<&str> = path.split('{').skip(1).map(|part| part.split('}').next().unwrap()).collect();
            assert_eq!(declared, named, "{at}");
            parameters().for_each(|parameter| schema(&document, &parameter["schema"], &at));
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.keys().any(|status| status.starts_with('2')), "{at}");
            let bodies = responses.values().map(|answer| document.resolve(answer));
            for body in bodies.chain([&operation["requestBody"]]) {
                let contents = body["content"].as_object().into_iter().flatten();
                contents.for_each(|(_, content)| schema(&document, &content["schema"], &at));
            }
        }
    }
    for (name, one) in document.0["components"]["schemas"].as_object().unwrap() {
        schema(&document, one, name);
    }

    /// Every keyword of a schema is one that is checked or describes, every reference leads somewhere.
    fn schema(document: &Document, one: &Value, at: &str) {
        for (keyword, value) in one.as_object().unwrap_or_else(|| panic!("{at}: {one} is no schema")) {
            assert!(CHECKED.contains(&keyword.as_str()) || DESCRIBING.contains(&keyword.as_str()), "{at}: {keyword}");
            match keyword.as_str() {
                "$ref" => drop(document.resolve(one)),
                "items" => schema(document, value, at),
                "properties" => value.as_object().unwrap().values().for_each(|part| schema(document, part, at)),
                _ => {}
            }
        }
    }
    // It says no to what does not fit.
    let error = |value: Value| document.fits(&document.0["components"]["schemas"]["Error"], &value, "").unwrap_err();
    assert!(error(json!({})).contains("missing") && error(json!({"detail": 1})).contains("type"));
    assert!(error(json!({"detail": "x", "more": 1})).contains("not described"));
}
