//! A running `edm2k serve`, and a client of HTTP that sends exactly what it is told to.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use edm2k::model::file::Stored;
use edm2k::model::{Config, Model};
use serde_json::{Value, json};

/// The tags of [`tiny`].
pub const TAGS: [&str; 5] = ["cat", "dog", "heart", "red", "smiling face"];

/// Writes a model of 16x16 pictures that takes a millisecond, with random gains, so that every part of it matters.
pub fn tiny(path: &Path, seed: u64) {
    of_width(16, path, seed);
}

/// The same with so many channels: with 128 some ten milliseconds.
pub fn of_width(channels: usize, path: &Path, seed: u64) {
    let config = json!({
        "img_resolution": 16, "img_channels": 3, "label_dim": 5, "model_channels": channels,
        "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16,
    });
    let config: Config = serde_json::from_value(config).unwrap();
    write(&config, path, seed, |model| model.meta.vocabulary = TAGS.map(String::from).to_vec());
}

/// Writes a model of random weights.
pub fn write(config: &Config, path: &Path, seed: u64, change: impl FnOnce(&mut Model)) {
    let mut model = Model::init(config, seed).unwrap();
    for ((id, spec), values) in model.table.iter().zip(&mut model.weights) {
        if spec.shape.is_empty() {
            values[0] = 0.5 + 0.1 * (id.0 % 5) as f32;
        }
    }
    change(&mut model);
    model.save(path, Stored::F16).unwrap();
}

/// `edm2k serve` on a free port; killed when it is dropped.
pub struct Server {
    child: Child,
    pub address: String,
}

impl Server {
    /// Starts it with these arguments, and waits until it listens.
    pub fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", dir, arguments)
    }

    /// The same, at an address.
    pub fn start_at(listen: &str, dir: &Path, arguments: &[&str]) -> Self {
        let mut child = command(listen, dir).args(arguments).stderr(Stdio::piped()).spawn().unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (said.clone(), BufReader::new(child.stderr.take().unwrap()));
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).for_each(|line| lines.lock().unwrap().push(line))
        });
        let started = Instant::now();
        loop {
            let found = said.lock().unwrap().iter().find_map(|line| Some(line.split_once("http://")?.1.to_owned()));
            if let Some(address) = found {
                return Self { child, address };
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{arguments:?}: it ended with {status}: {:?}", said.lock().unwrap());
            }
            assert!(started.elapsed() < Duration::from_secs(60), "it does not listen: {:?}", said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The number of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to stop, and waits until it has.
    pub fn stop(mut self) -> ExitStatus {
        // SAFETY: a child of ours, not waited for yet.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
        self.child.wait().unwrap()
    }

    /// Sends a request as it is and reads the whole answer; none if the connection broke.
    pub fn raw(&self, request: &[u8]) -> Option<Answer> {
        let mut stream = TcpStream::connect(&self.address).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(120))).ok()?;
        // A server that has answered may not want the rest.
        let _ = stream.write_all(request);
        Answer::read(BufReader::new(stream))
    }

    /// A request with headers.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let answer = self.raw(&message(&self.address, method, path, headers, body));
        answer.unwrap_or_else(|| panic!("{method} {path}: no answer"))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// Opens a stream of events; the lines after "data: ", until the server ends it.
    pub fn events(&self, path: &str) -> impl Iterator<Item = Value> + use<> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(&message(&self.address, "GET", path, &[], b"")).unwrap();
        let lines = BufReader::new(stream).lines().map_while(Result::ok);
        lines.filter_map(|line| Some(serde_json::from_str(line.strip_prefix("data: ")?).unwrap()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `edm2k serve` on the CPU, at any port.
fn command(listen: &str, dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edm2k"));
    command.args(["serve", "--device", "cpu"]).current_dir(dir).env_remove("EDM2K_TOKEN");
    command.args(["--listen", listen]);
    command
}

/// The bytes of a request.
pub fn message(host: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if !headers.iter().any(|(name, _)| *name == "host") {
        text += &format!("host: {host}\r\n");
    }
    headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
    [text.as_bytes(), b"\r\n", body].concat()
}

/// An answer of the server.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    fn read(mut stream: impl BufRead) -> Option<Self> {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            stream.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_lowercase(), value.to_owned()));
        }
        let mut body = Vec::new();
        stream.read_to_end(&mut body).ok()?;
        Some(Self { status, headers, body })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}: {}", self.status, self.text()))
    }

    /// Its JSON, if the status is this.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        self.json()
    }
}
