//! Several processes at one thing: who they are, how they meet, what they compute, and what happens to one happens to all.
#![cfg(unix)]

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

#[cfg(all(feature = "emulator", feature = "cuda"))]
use crate::common::driver;
use crate::common::place::{self, assert_same_tensors, files, signal, stats, succeed, text};
use edm2k::backend::cpu::Cpu;
use edm2k::backend::{Slot, TrainingBackend, Values};
use edm2k::collective::{Collective, CollectiveError, Patience, Star, World};
use edm2k::data::dataset::{Dataset, Split};
use edm2k::model::{Config, ImageSpace, Model, ModelMeta, Stored};
use edm2k::params::ParamId;
use edm2k::pictures::{Picture, decode};
use edm2k::rng::{Purpose, Stream};
use edm2k::train::{Event, Execution, Outcome, Settings, Splits, Training, train};
use serde_json::{Value, json};

// ---- meeting --------------------------------------------------------------------------------

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn world(rank: usize, size: usize, port: u16) -> World {
    World { rank, size, local: rank, address: "127.0.0.1".into(), port, job: "a test".into(), said_by: "the test" }
}

fn patience(meet: u64, wait: Option<u64>) -> Patience {
    Patience { meet: Duration::from_secs(meet), wait: wait.map(Duration::from_secs), alone: Duration::from_secs(10) }
}

fn join(world: World, seconds: u64) -> Result<Star, CollectiveError> {
    Star::join(world, patience(seconds, None), &mut |_| {}, |_| {})
}

/// Does `work` on `size` ranks that meet, each in a thread; what it returns on each.
fn on_ranks<T: Send>(size: usize, work: impl Fn(&mut Star) -> T + Sync) -> Vec<T> {
    let (port, work) = (free_port(), &work);
    thread::scope(|scope| {
        let rank = |rank| scope.spawn(move || work(&mut join(world(rank, size, port), 20).unwrap()));
        let all: Vec<_> = (0..size).map(rank).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// What each of some processes that call themselves ranks is told; each begins after so many milliseconds.
fn errors(worlds: Vec<(u64, World)>, seconds: u64) -> Vec<Option<String>> {
    thread::scope(|scope| {
        let rank = |(delay, world)| {
            scope.spawn(move || {
                sleep(Duration::from_millis(delay));
                join(world, seconds).err().map(|why| why.to_string())
            })
        };
        let all: Vec<_> = worlds.into_iter().map(rank).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn sums_are_those_in_the_order_of_the_ranks_with_the_same_bits_on_all() {
    // Values whose sum depends on the order; more than go through a socket at once.
    let values = |rank: usize| {
        let mut values = vec![0.0; 70_001];
        Stream::new(3, Purpose::Init, rank as u64).normals(&mut values);
        values.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi((i * 7 + rank * 3) as i32 % 9 - 4));
        values
    };
    for size in [2, 4] {
        let found = on_ranks(size, |ranks| {
            let (mut sum, mut few, mut first) = (values(ranks.rank()), [1.0, 2.0], values(ranks.rank()));
            ranks.all_reduce(Values::Host(&mut sum)).unwrap();
            ranks.all_reduce(Values::Host(&mut few)).unwrap();
            ranks.broadcast(Values::Host(&mut first)).unwrap();
            ranks.barrier().unwrap();
            let said = ranks.gather(&vec![ranks.rank() as u8; ranks.rank()]).unwrap();
            ranks.leave(None);
            (sum, few, first, said)
        });
        let mut expected = values(0);
        (1..size).for_each(|rank| expected.iter_mut().zip(values(rank)).for_each(|(sum, x)| *sum += x));
        let said: Vec<Vec<u8>> = (0..size).map(|rank| vec![rank as u8; rank]).collect();
        for (sum, few, first, heard) in found {
            assert!(sum.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
            assert_eq!(few, [size as f32, 2.0 * size as f32]);
            assert!(first == values(0));
            assert_eq!(heard, said);
        }
    }
}

#[test]
fn ranks_come_in_any_order() {
    let port = free_port();
    let late = [600, 0, 300].into_iter().enumerate().map(|(rank, delay)| (delay, world(rank, 3, port)));
    assert_eq!(errors(late.collect(), 20), [None, None, None]);
}

/// Debian's machines have their own name as 127.0.1.1, which no other can call.
#[cfg(target_os = "linux")]
#[test]
fn rank_0_is_reached_from_elsewhere_though_its_name_means_loopback_to_itself() {
    let port = free_port();
    let own = World { address: "127.0.1.1".into(), ..world(0, 2, port) };
    assert_eq!(errors(vec![(0, own), (200, world(1, 2, port))], 5), [None, None]);
}

#[test]
fn who_does_not_come_is_named_to_all_who_came() {
    let port = free_port();
    let said = errors(vec![(0, world(0, 4, port)), (0, world(2, 4, port))], 1);
    let why = "2 of 4 ranks did not come within 1 s: rank 1, rank 3";
    assert_eq!(said[0].as_deref(), Some(why));
    assert_eq!(said[1], Some(format!("rank 0 refuses: {why}")));

    let alone = errors(vec![(0, world(1, 2, port))], 1).remove(0).unwrap();
    assert!(alone.starts_with(&format!("rank 1 found no rank 0 at 127.0.0.1:{port} within 1 s: ")), "{alone}");
    let nowhere = World { address: "no-such-machine.invalid".into(), ..world(1, 2, port) };
    let nowhere = errors(vec![(0, nowhere)], 1).remove(0).unwrap();
    assert!(nowhere.starts_with("rank 1 found no rank 0 at no-such-machine.invalid:"), "{nowhere}");
}

#[test]
fn who_says_nothing_at_the_port_is_another_program() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let begun = Instant::now();
    let said = errors(vec![(0, world(1, 2, port))], 1).remove(0).unwrap();
    let why = "another program may be there; EDM2K_PORT sets another port on all ranks";
    assert!(
        said.starts_with(&format!("rank 0 at 127.0.0.1:{port} said nothing for 1")) && said.ends_with(why),
        "{said}"
    );
    assert!(begun.elapsed() < Duration::from_secs(18), "it is not waited for twice");
}

#[test]
fn who_does_not_fit_is_named_at_once() {
    let port = free_port();
    let begun = Instant::now();
    let said = errors(vec![(0, world(0, 3, port)), (0, world(1, 3, port)), (400, world(1, 3, port))], 60);
    for said in &said {
        assert!(said.as_ref().unwrap().contains("two processes have the same number: rank 1 ("), "{said:?}");
    }
    let said = errors(vec![(0, world(0, 2, port)), (0, world(1, 3, port))], 60);
    assert!(said[0].as_ref().unwrap().contains("counts 3 ranks, rank 0 counts 2"), "{said:?}");
    let said = errors(vec![(0, world(0, 3, port)), (200, world(0, 3, port)), (400, world(2, 4, port))], 60);
    assert!(said[1].as_ref().unwrap().contains("another rank 0 or another program is there?"), "{said:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "nobody waits for the limit");
}

/// As a launcher does that starts a rank again.
#[test]
fn a_rank_that_ends_while_the_others_come_leaves_its_place() {
    let place = Place::new();
    let port = free_port();
    let rank = |rank, seconds: &str| {
        let mut command = place.rank(rank, 3, port, &options("run", 10));
        command.env("EDM2K_RANKS_TIMEOUT", seconds).spawn().unwrap()
    };
    let one_ends = |seconds: &str| {
        let (first, second) = (rank(0, seconds), rank(1, seconds));
        sleep(Duration::from_millis(1500));
        signal(&second, "-KILL");
        outputs(vec![second]);
        first
    };
    let said = text(&outputs(vec![one_ends("3")])[0]);
    assert!(said.contains("2 of 3 ranks did not come within 3 s: rank 1, rank 2"), "{said}");
    for output in outputs(vec![one_ends("30"), rank(1, "30"), rank(2, "30")]) {
        assert!(output.status.success(), "{}", text(&output));
    }
}

#[test]
fn strangers_and_other_jobs_disturb_no_meeting() {
    let port = free_port();
    let said = thread::scope(|scope| {
        let met = scope.spawn(move || errors(vec![(0, world(0, 2, port)), (900, world(1, 2, port))], 20));
        sleep(Duration::from_millis(300));
        let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut rude = TcpStream::connect(("127.0.0.1", port)).unwrap();
        rude.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut huge = TcpStream::connect(("127.0.0.1", port)).unwrap();
        huge.write_all(b"edm2krnk\xff\xff\xff\xff").unwrap();
        let other = World { job: "another".into(), ..world(1, 2, port) };
        let refused = join(other, 20).err().unwrap().to_string();
        assert!(refused.starts_with("rank 0 refuses: it belongs to job 'a test', rank 1 ("), "{refused}");
        assert!(refused.ends_with(" to job 'another'"), "{refused}");
        met.join().unwrap()
    });
    assert_eq!(said, [None, None]);
}

#[test]
fn a_rank_that_is_gone_or_fails_is_named_to_those_that_wait() {
    for (who, failed) in [(0, None), (2, None), (2, Some("the disk is full")), (0, Some("no data"))] {
        let begun = Instant::now();
        let said = on_ranks(4, |ranks| {
            ranks.barrier().unwrap();
            if ranks.rank() == who {
                // Not while some are still on their way out of that meeting.
                sleep(Duration::from_millis(300));
                failed.iter().for_each(|why| ranks.leave(Some(why)));
                return None;
            }
            let mut values = [1.0];
            Some(ranks.all_reduce(Values::Host(&mut values)).unwrap_err().to_string())
        });
        for (rank, said) in said.iter().enumerate().filter(|(rank, _)| *rank != who) {
            let said = said.as_ref().unwrap();
            assert!(said.starts_with(&format!("rank {who} (")) && said.contains("process "), "rank {rank}: {said}");
            let end = failed.map_or(") has ended".to_owned(), |why| format!(") failed: {why}"));
            assert!(said.contains(&end), "rank {rank}: {said}");
        }
        assert!(begun.elapsed() < Duration::from_secs(15));
    }
}

#[test]
fn a_rank_that_is_at_other_work_when_one_is_lost_is_told_too() {
    let (sender, told) = std::sync::mpsc::channel();
    let port = free_port();
    thread::scope(|scope| {
        scope.spawn(move || {
            let tell = move |who: &str| drop(sender.send(who.to_owned()));
            let ranks = Star::join(world(0, 2, port), patience(20, None), &mut |_| {}, tell).unwrap();
            let who = told.recv_timeout(Duration::from_secs(30)).unwrap();
            assert!(who.starts_with("rank 1 (") && who.ends_with(") has ended"), "{who}");
            drop(ranks);
        });
        scope.spawn(move || drop(join(world(1, 2, port), 20).unwrap()));
    });
}

#[test]
fn a_rank_with_work_of_its_own_may_end_that_when_another_is_lost() {
    // (whether it waits for the other, how long it may go on otherwise, how long it lives)
    for (waits, alone, lives) in [(true, 60, 9..13), (false, 14, 13..18)] {
        let (sender, told) = std::sync::mpsc::channel();
        let port = free_port();
        thread::scope(|scope| {
            scope.spawn(move || {
                let tell = move |who: &str| drop(sender.send(who.to_owned()));
                let patience = Patience { alone: Duration::from_secs(alone), ..patience(20, None) };
                let ranks = Star::join(world(0, 2, port), patience, &mut |_| {}, tell).unwrap();
                if waits {
                    ranks.waits();
                }
                let begun = Instant::now();
                told.recv_timeout(Duration::from_secs(30)).unwrap();
                assert!(lives.contains(&begun.elapsed().as_secs()), "{waits}: {:?}", begun.elapsed());
            });
            scope.spawn(move || drop(join(world(1, 2, port), 20).unwrap()));
        });
    }
}

#[test]
fn ranks_say_for_whom_they_wait() {
    let port = free_port();
    thread::scope(|scope| {
        let rank = |number| {
            let mut said = String::new();
            let met = Star::join(world(number, 3, port), patience(30, None), &mut |text| said += text, |_| {});
            (met.unwrap(), said)
        };
        let first = scope.spawn(move || rank(0));
        let second = scope.spawn(move || rank(1));
        sleep(Duration::from_secs(7));
        let third = rank(2);
        let (first, second) = (first.join().unwrap(), second.join().unwrap());
        let place = format!("at 127.0.0.1:{port}");
        assert_eq!(first.1, format!("waiting {place} for rank 2 (the test says that there are 3 ranks)"));
        assert_eq!(second.1, format!("waiting for the others {place} (the test says that there are 3 ranks)"));
        assert_eq!(third.1, "");
    });
}

#[test]
fn who_is_at_work_is_waited_for_unless_all_have_as_much_to_do() {
    for longest in [None, Some(2)] {
        let port = free_port();
        thread::scope(|scope| {
            let rank = |rank, longest: Option<u64>| {
                Star::join(world(rank, 2, port), patience(20, longest), &mut |_| {}, |_| {}).unwrap()
            };
            scope.spawn(move || {
                let mut slow = rank(1, None);
                sleep(Duration::from_secs(5));
                let _ = slow.barrier();
            });
            let said = rank(0, longest).barrier().map_err(|why| why.to_string());
            match longest {
                None => assert_eq!(said, Ok(())),
                Some(_) => assert!(said.unwrap_err().ends_with(") has waited 2 s for the other ranks")),
            }
        });
    }
}

// ---- training -------------------------------------------------------------------------------

const CONFIG: &str = r#"{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 8}"#;

/// A directory with a small dataset and a config.
enum Here {}
type Place = place::Place<Here>;

impl Place {
    fn new() -> Self {
        let place = Self::empty();
        place.prepare("data", 0);
        fs::write(place.path("config.json"), CONFIG).unwrap();
        place
    }

    /// A dataset of noise.
    fn prepare(&self, name: &str, seed: u64) {
        self.prepare_sizes(name, seed, &[[8, 8]]);
    }

    /// One of pictures of several sizes (width and height), more of the first ones.
    fn prepare_sizes(&self, name: &str, seed: u64, sizes: &[[usize; 2]]) {
        let pictures = self.path(&format!("pictures-{name}"));
        fs::create_dir(&pictures).unwrap();
        let mut lines = String::new();
        for i in 0..48 {
            let [width, height] = sizes[[0, 0, 1, 0, 2, 1][i as usize % 6] % sizes.len()];
            let mut noise = vec![0.0; width * height * 3];
            Stream::new(seed, Purpose::Init, i).normals(&mut noise);
            let rgb = noise.iter().map(|x| (x * 64.0 + 128.0) as u8).collect();
            Picture::new(height, width, rgb).save(&pictures.join(format!("{i}.png")), &[]).unwrap();
            let line = json!({"id": i * 7 + 2, "file": format!("{i}.png"), "tags": [format!("t{}", i % 5)]});
            lines += &format!("{line}\n");
        }
        fs::write(self.path("meta.jsonl"), lines).unwrap();
        let mut prepare = self.command("prepare --vocabulary 16 --validation-modulus 5 --metadata meta.jsonl --sizes");
        prepare.arg(sizes.iter().map(|[width, height]| format!("{width}x{height}")).collect::<Vec<_>>().join(","));
        prepare.arg("--images").arg(&pictures).args(["--out", name]);
        succeed(&mut prepare);
    }

    /// `edm2k` with these arguments, as rank number `rank` of `size`; alone for a size of 1.
    fn rank(&self, rank: usize, size: usize, port: u16, arguments: &str) -> Command {
        let mut command = self.command(arguments);
        command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
        if size > 1 {
            command
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", size.to_string())
                .env("LOCAL_RANK", rank.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.env("EDM2K_RANKS_TIMEOUT", "30");
        }
        command
    }

    /// Starts the same command on all ranks.
    fn start(&self, size: usize, arguments: &str) -> Vec<Child> {
        let port = free_port();
        (0..size).map(|rank| self.rank(rank, size, port, arguments).spawn().unwrap()).collect()
    }

    /// Runs the same command on all ranks to its end, which is a good one; what rank 0 said.
    fn run(&self, size: usize, arguments: &str) -> String {
        let ended = outputs(self.start(size, arguments));
        ended.iter().for_each(|output| assert!(output.status.success(), "{arguments}: {}", text(output)));
        for output in &ended[1..] {
            assert_eq!(text(output), "", "one rank speaks for all");
        }
        text(&ended[0])
    }
}

fn outputs(children: Vec<Child>) -> Vec<Output> {
    let waiting = children.into_iter().map(|child| thread::spawn(|| child.wait_with_output().unwrap()));
    let waiting: Vec<_> = waiting.collect();
    waiting.into_iter().map(|output| output.join().unwrap()).collect()
}

/// The options of a run of 12 steps with everything that there is beside; 10 images do not go into 4 shares.
fn options(out: &str, duration: u64) -> String {
    format!(
        "train --data data --config config.json --outdir {out} --batch 10 --rampup 0 --lr 0.01 --device cpu \
         --cond-dropout 0.2 --dropout 0.1 --status 10 --validate 40 --grid 60 --snapshot 60 --checkpoint 40 --duration {duration}"
    )
}

/// The relative distance of two runs' weights and averages, that of the worst, and its name.
fn distance(place: &Place, one: &str, other: &str) -> (f64, String) {
    place::distance(&place.newest(one), &place.newest(other), &["weight.", "ema"], 1e-15)
}

/// Two runs' statistics are of the same images, and say the same but for rounding.
fn assert_near(a: &Path, b: &Path) {
    let (a, b) = (stats(a), stats(b));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        for key in ["nimg", "step", "lr", "nonfinite"] {
            assert_eq!(a[key], b[key], "{key}: {a} {b}");
        }
        for key in ["loss", "grad_norm", "validation_loss"] {
            let (Some(a), Some(b)) = (a[key].as_f64(), b[key].as_f64()) else { continue };
            // See `the_size_of_micro_batches_changes_rounding_only`: weights differ by rounding that Adam magnifies.
            assert!((a - b).abs() < 5e-3 * (a.abs() + b.abs()), "{key}: {a} {b}");
        }
    }
}

#[test]
fn several_ranks_compute_what_one_does() {
    let place = Place::new();
    place.run(1, &options("one", 120));
    for size in [2, 4] {
        let out = format!("of-{size}");
        let said = place.run(size, &options(&out, 120));
        assert!(said.contains(&format!("{size} ranks on the CPU: gradients go through rank 0, which is for tests")));
        let far = distance(&place, "one", &out);
        println!("{size}: {far:?}");
        // See `the_size_of_micro_batches_changes_rounding_only`. With a rank's share left out or taken twice, each step's
        // gradient is another one: 1e-1.
        assert!(far.0 < 5e-3, "{size} ranks: {far:?}");
        assert_near(&place.path("one"), &place.path(&out));
        let names = |out: &str| {
            let names = fs::read_dir(place.path(out)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        };
        assert_eq!(names("one"), names(&out), "the same files");
        let grid = |out: &str| decode::open(&place.path(out).join("grid-000000060.png"), [0; 3]).unwrap().picture;
        let (one, several) = (grid("one"), grid(&out));
        let far = one.rgb().iter().zip(several.rgb()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>();
        let far = far / one.rgb().len() as f64;
        println!("{size}: grids differ by {far}");
        // Samples in another order, or none, are 50 levels away on average.
        assert!(far < 5.0, "grids differ by {far} of 255");
    }
}

/// An image's size follows from its number too, whoever shows it; shares cut groups of one size.
#[test]
fn several_ranks_train_on_several_sizes_as_one_does() {
    let place = Place::new();
    place.prepare_sizes("sizes", 0, &[[8, 8], [16, 8], [8, 16]]);
    let options = |out: &str| options(out, 120).replace("--data data", "--data sizes");
    place.run(1, &options("one"));
    for size in [2, 4] {
        let out = format!("of-{size}");
        place.run(size, &options(&out));
        let far = distance(&place, "one", &out);
        println!("{size}: {far:?}");
        assert!(far.0 < 5e-3, "{size} ranks: {far:?}");
        assert_near(&place.path("one"), &place.path(&out));
    }
}

/// The gradients are in device memory there, which is summed through the host.
#[cfg(feature = "emulator")]
#[test]
fn several_ranks_on_the_emulator_compute_what_one_does() {
    let place = Place::new();
    // The kernels' heads have 16 channels at least.
    fs::write(place.path("config.json"), CONFIG.replace(": 8", ": 16")).unwrap();
    let options = |out: &str| {
        let intervals = "--grid 0 --validate 0 --snapshot 0 --status 0 --checkpoint 0";
        format!(
            "train --data data --config config.json --outdir {out} --batch 8 --rampup 0 --lr 0.01 --device emulated \
             --batch-gpu 2 {intervals} --duration 16"
        )
    };
    place.run(1, &options("one"));
    for size in [2, 4] {
        let out = format!("of-{size}");
        let said = place.run(size, &options(&out));
        assert!(said.contains(&format!("{size} ranks on the emulator")), "{said}");
        let far = distance(&place, "one", &out);
        println!("{size}: {far:?}");
        // The same micro-batches: what differs is the order in which their gradients are added, and what Adam makes of it.
        assert!(far.0 < 5e-3, "{size} ranks: {far:?}");
    }
}

/// By the code for cards, on drivers whose cards are the emulator's and an NCCL that sums through files: once with all that a
/// device does as late as it may be, once with what is on other streams than the kernels at once.
#[cfg(all(feature = "emulator", feature = "cuda"))]
#[test]
fn several_ranks_on_cards_compute_what_one_does() {
    let place = Place::new();
    fs::write(place.path("config.json"), CONFIG.replace(": 8", ": 16")).unwrap();
    let (libraries, _) = driver::stand_in("driver.cpp", "libcuda.so.1", &[]);
    let (_nccl, nccl) = driver::stand_in("nccl.cpp", "libnccl.so.2", &[]);
    let start = |out: &str, size: usize, early: bool, cards: usize| {
        let intervals = "--grid 0 --validate 0 --snapshot 0 --status 7 --checkpoint 0";
        // Several micro-batches, of which one rank has more than the other.
        let options = format!(
            "train --data data --config config.json --outdir {out} --batch 7 --rampup 0 --lr 0.01 --device cuda \
             --batch-gpu 1 {intervals} --duration 14"
        );
        let port = free_port();
        let ranks = (0..size).map(|rank| {
            let mut command = place.rank(rank, size, port, &options);
            command.env("LD_LIBRARY_PATH", libraries.path()).env("EMULATOR_LIBRARY", env!("EMULATOR_LIBRARY"));
            command.env("EDM2K_NCCL", &nccl).env("TMPDIR", place.dir()).env_remove("EDM2K_NO_GPU");
            command.env("CUDA_VISIBLE_DEVICES", (rank % cards).to_string());
            early.then(|| command.env("DRIVER_EARLY", "1"));
            command.spawn().unwrap()
        });
        outputs(ranks.collect())
    };
    for output in start("none", 2, false, 1) {
        assert!(
            text(&output).contains("rank 0 and rank 1 have the same card, Emulated Card (cuda:0) of "),
            "{}",
            text(&output)
        );
    }
    let train = |out: &str, size: usize, early: bool| {
        let ended = start(out, size, early, size);
        ended.iter().for_each(|output| assert!(output.status.success(), "{out}: {}", text(output)));
    };
    train("one", 1, false);
    for early in [false, true] {
        let out = format!("two-{early}");
        train(&out, 2, early);
        let far = distance(&place, "one", &out);
        println!("early {early}: {far:?}");
        assert!(far.0 < 5e-3, "early {early}: {far:?}");
        assert_near(&place.path("one"), &place.path(&out));
    }
    assert_same_tensors(&place.newest("two-false"), &place.newest("two-true"));
}

#[test]
fn all_ranks_have_the_same_bits() {
    let place = Place::new();
    let data = Dataset::open(&place.path("data"), Split::Train).unwrap();
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    (config["img_resolution"], config["img_channels"]) = (8.into(), 3.into());
    config["label_dim"] = data.condition_dim().into();
    let config: Config = serde_json::from_value(config).unwrap();
    let settings = Settings { batch: 7, rampup: 0, ..Settings::new(&data, config.clone(), 63) };
    let usual = Execution::new(place.path("run"), &settings, &edm2k::Device::open("cpu").unwrap());
    // One takes its images one by one.
    let all = on_ranks(3, |ranks| {
        let data = Dataset::open(&place.path("data"), Split::Train).unwrap();
        let model = Model::init(&config, ranks.rank() as u64).unwrap(); // rank 0's counts
        let mut backend = Cpu::<f32>::for_training(&model.table, 2);
        let (table, batch_gpu) = (model.table.clone(), if ranks.rank() == 1 { 1 } else { 3 });
        let execution = Execution { batch_gpu, validate: 0, grid: 0, ..usual.clone() };
        let splits = Splits { train: &data, validation: None };
        let stop = AtomicBool::new(false);
        let (settings, execution, event) = (&settings, &execution, &mut |_: Event| {});
        let training = Training { model, settings, execution, splits, show: None, stop: &stop, event, ranks };
        let done = train(&mut backend, training);
        assert_eq!(done.unwrap(), Outcome::Finished);
        ranks.leave(None);
        let slots = [Slot::Weight, Slot::AdamM, Slot::AdamV, Slot::Ema(0), Slot::Ema(1)];
        let of = |slot| (0..table.len()).map(move |id| (slot, ParamId(id)));
        let mut read = |(slot, id)| backend.read_param(slot, id).unwrap();
        slots.into_iter().flat_map(of).flat_map(&mut read).map(f32::to_bits).collect::<Vec<u32>>()
    });
    assert!(all[0].len() > 10_000 && all[0].iter().any(|&bits| bits != 0));
    assert!(all[1] == all[0] && all[2] == all[0]);
}

#[test]
fn a_run_goes_on_with_other_numbers_of_ranks() {
    let place = Place::new();
    place.run(1, &options("one", 120));
    place.run(4, &options("some", 40));
    place.run(2, &options("some", 80));
    let said = place.run(1, &options("some", 120));
    assert!(said.contains("resuming from"), "{said}");
    let far = distance(&place, "one", "some");
    assert!(far.0 < 5e-3, "{far:?}");
    assert_near(&place.path("one"), &place.path("some"));
}

#[test]
fn snapshots_are_shared_out_where_all_ranks_see_the_directory() {
    let (place, elsewhere) = (Place::new(), Place::empty());
    let options = |out: &str, duration| {
        let options = options(out, duration).replace("--checkpoint 40", "--checkpoint 20");
        let found = |name: &str| place.path(name).display().to_string();
        options
            .replace("--data data", &format!("--data {}", found("data")))
            .replace("config.json", &found("config.json"))
    };
    // A limit on the size of files fails a write in the middle, as a full disk does. Rank 1 cannot write a thing.
    let limited = |out: &str, there: &Place| {
        let (port, options) = (free_port(), options(out, 120));
        let rank = there.rank(1, 2, port, &options);
        let mut second = Command::new("bash");
        second.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "bash", env!("CARGO_BIN_EXE_edm2k")]);
        second.args(rank.get_args()).envs(rank.get_envs().filter_map(|(name, value)| Some((name, value?))));
        second.current_dir(there.dir()).stdout(Stdio::piped()).stderr(Stdio::piped());
        outputs(vec![place.rank(0, 2, port, &options).spawn().unwrap(), second.spawn().unwrap()])
    };
    let snapshots = |out: &str| {
        let mut files = files(&place.path(out));
        files.retain(|name, _| name.starts_with("snapshot-"));
        files
    };

    // Rank 0 writes all if rank 1's directory is another one, though it has the same name and the same files.
    place.run(2, &options("apart", 40));
    let copy = elsewhere.path("apart");
    fs::create_dir(&copy).unwrap();
    let before = files(&place.path("apart"));
    before.iter().for_each(|(name, content)| fs::write(copy.join(name), content).unwrap());
    let ended = limited("apart", &elsewhere);
    ended.iter().for_each(|output| assert!(output.status.success(), "{}", text(output)));
    assert_eq!(text(&ended[1]), "", "one rank speaks for all");
    assert!(files(&copy) == before, "rank 1 wrote");
    let expected = snapshots("apart");
    let of = |nimg: u64| ["0.050", "0.100"].map(|std| format!("snapshot-{nimg:09}-{std}.safetensors"));
    assert!(expected.keys().eq(&[of(40), of(60), of(120)].concat()), "{:?}", expected.keys());
    of(120).iter().for_each(|name| assert!(text(&ended[0]).contains(&format!("wrote apart/{name}"))));

    // Where they share one, the second average is rank 1's, and without it there is no checkpoint.
    place.run(2, &options("shared", 40));
    let ended = limited("shared", &place);
    let [own, others] = of(60);
    for (rank, output) in ended.iter().enumerate() {
        let said = text(output);
        let errors: Vec<_> = said.lines().filter(|line| line.starts_with("edm2k: error: ")).collect();
        assert!(output.status.code() == Some(1) && errors.len() == 1, "{said}");
        assert!(rank == 1 || errors[0].contains("rank 1 ("), "{said}");
        assert!(errors[0].contains(&format!("shared/{others}: File too large")), "{said}");
    }
    let found = snapshots("shared");
    assert!(found.len() == 3 && found[&own] == expected[&own], "{:?}", found.keys());
    assert!(place.newest("shared").ends_with("checkpoint-000000040.safetensors"));
    assert!(files(&place.path("shared")).keys().all(|name| !name.ends_with(".tmp")), "half a file is left");

    // What rank 1's copy of the data says of itself is not what its snapshots say.
    let prepare =
        "prepare --vocabulary 16 --validation-modulus 5 --metadata meta.jsonl --sizes 8x8 --images pictures-data";
    succeed(&mut place.command(&format!("{prepare} --source elsewhere --out copied")));
    let (port, ours) = (free_port(), options("shared", 120));
    let lines = [&ours, &ours.replace("/data ", "/copied ")];
    let ranks = lines.iter().enumerate().map(|(rank, line)| place.rank(rank, 2, port, line).spawn().unwrap());
    let ended = outputs(ranks.collect());
    ended.iter().for_each(|output| assert!(output.status.success(), "{}", text(output)));
    let said = text(&ended[0]);
    of(120).iter().for_each(|name| assert!(said.contains(&format!("wrote shared/{name}")), "{said}"));
    assert!(snapshots("shared") == expected, "other files than rank 0 writes alone");
    assert_same_tensors(&place.newest("apart"), &place.newest("shared"));
}

const ENDLESS: &str = "train --data data --config config.json --outdir run --batch 8 --device cpu --grid 0 --validate 0 \
                       --checkpoint 0 --snapshot 0 --status 800 --duration 10M";

/// Waits until a run is at work.
fn under_way(place: &Place) {
    let begun = Instant::now();
    while !fs::read_to_string(place.path("run/stats.jsonl")).is_ok_and(|text| text.lines().count() > 1) {
        assert!(begun.elapsed() < Duration::from_secs(60), "the run does not begin");
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_to_one_rank_stops_all_after_the_same_step() {
    let place = Place::new();
    for (who, kind) in [(2, "-USR1"), (0, "-TERM")] {
        let ranks = place.start(3, ENDLESS);
        under_way(&place);
        signal(&ranks[who], kind);
        let ended = outputs(ranks);
        for (rank, output) in ended.iter().enumerate() {
            assert_eq!(output.status.code(), Some(130), "rank {rank}: {}", text(output));
            assert_eq!(text(output).contains("finishing this step"), rank == who, "{}", text(output));
        }
        assert!(text(&ended[0]).contains("the same command again goes on from there"), "{}", text(&ended[0]));
        place.newest("run");
        fs::remove_file(place.path("run/stats.jsonl")).unwrap();
    }
}

#[test]
fn ranks_killed_at_random_moments_end_the_others_and_lose_nothing() {
    let place = Place::new();
    place.run(3, &options("whole", 240));
    let (mut kills, mut lives) = (0, 0u64);
    while kills < 5 {
        let words = Stream::new(11, Purpose::Order, lives).block(0);
        lives += 1;
        assert!(lives < 40, "it does not get anywhere");
        let mut ranks = place.start(3, &options("killed", 240));
        sleep(Duration::from_millis(u64::from(words[0] % 900)));
        let who = words[1] as usize % 3;
        let begun = Instant::now();
        if ranks[who].try_wait().unwrap().is_some() {
            outputs(ranks).iter().for_each(|output| assert!(output.status.success(), "{}", text(output)));
            fs::remove_dir_all(place.path("killed")).unwrap();
            continue;
        }
        signal(&ranks[who], "-KILL");
        kills += 1;
        let ended = outputs(ranks);
        assert!(begun.elapsed() < Duration::from_secs(50), "within a minute");
        for (rank, output) in ended.iter().enumerate().filter(|(rank, _)| *rank != who) {
            let said = text(output);
            let errors: Vec<_> = said.lines().filter(|line| line.starts_with("edm2k: error: ")).collect();
            // It may have been the last moment, or the first one.
            let before = errors.len() == 1 && said.contains("rank 0 at 127.0.0.1:") && who == 0;
            let named = errors.len() == 1 && errors[0].contains(&format!("rank {who} ("));
            let missed = errors.len() == 1 && errors[0].contains(&format!("rank {who}"));
            assert!(output.status.success() || named || before || missed, "killed {who}, rank {rank}: {said}");
            assert!(output.status.success() || output.status.code() == Some(1), "{:?}: {said}", output.status);
        }
    }
    place.run(3, &options("killed", 240));
    assert_same_tensors(&place.newest("whole"), &place.newest("killed"));
}

#[test]
fn what_differs_between_ranks_is_named() {
    let place = Place::new();
    place.prepare("other", 1);
    let with = |changed: &str| {
        let port = free_port();
        let options = options("run", 40);
        let name = changed.split(' ').next().unwrap();
        let theirs = match options.split(name).nth(1) {
            Some(rest) => options.replace(&format!("{name} {}", rest.split_whitespace().next().unwrap()), changed),
            None => format!("{options} {changed}"),
        };
        let ranks = [&options, &theirs, &options].map(|options| options.to_owned());
        let ranks = ranks.iter().enumerate().map(|(rank, options)| place.rank(rank, 3, port, options).spawn().unwrap());
        let ended = outputs(ranks.collect());
        for output in &ended {
            assert_eq!(output.status.code(), Some(1), "{}", text(output));
            assert!(
                text(output).lines().filter(|line| line.starts_with("edm2k: error")).count() == 1,
                "{}",
                text(output)
            );
        }
        assert!(!place.path("run").exists(), "nothing was begun");
        text(&ended[0])
    };
    let said = with("--seed 7");
    assert!(said.contains("rank 1 differs from rank 0: seed is 7 there, 0 here"), "{said}");
    let said = with("--keep 7 --ema 0.1");
    assert!(said.contains("rank 1 differs from rank 0: ema is [0.1] there, [0.05,0.1] here; keep is 7 there, 3 here"));
    let said = with("--data other");
    assert!(said.contains("rank 1 differs from rank 0: data.content is "), "{said}");
    // Other images to validate on, or none.
    for (name, theirs) in [("others", Some("other/validation-00000.safetensors")), ("none", None)] {
        fs::create_dir(place.path(name)).unwrap();
        for (file, content) in files(&place.path("data")) {
            fs::write(place.path(name).join(file), content).unwrap();
        }
        let shard = place.path(name).join("validation-00000.safetensors");
        fs::remove_file(&shard).unwrap();
        // It would know another shard of that name.
        fs::remove_file(place.path(name).join("summary.json")).unwrap();
        theirs.map(|theirs| fs::copy(place.path(theirs), &shard).unwrap());
    }
    let said = with("--data others");
    assert!(said.contains("rank 1 differs from rank 0: validation.content is "), "{said}");
    let said = with("--data none");
    assert!(said.contains("rank 1 differs from rank 0: validation.images is 0 there, 9 here"), "{said}");
    let said = with("--lr nan");
    assert!(said.contains("rank 1 (") && said.contains("failed: lr is NaN, expected a positive number"), "{said}");
}

#[test]
fn what_differs_between_ranks_is_named_whatever_they_do() {
    let place = Place::new();
    let emoji = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/emoji.safetensors");
    let sample = format!("sample --model {emoji} --device cpu --steps 2 --seeds 0-3 --batch 2 --outdir out");
    let eval = format!("eval --model {emoji} --data data --device cpu --images 2");
    let said = |ours: &str, theirs: &str| {
        let port = free_port();
        let ranks = [ours, theirs].into_iter().enumerate().map(|(rank, line)| place.rank(rank, 2, port, line).spawn());
        let ended = outputs(ranks.map(Result::unwrap).collect());
        let said: Vec<_> = ended.iter().map(text).collect();
        ended.iter().for_each(|output| assert_eq!(output.status.code(), Some(1), "{said:?}"));
        let errors = |said: &String| said.lines().rfind(|line| line.contains("error: ")).unwrap().to_owned();
        let errors: Vec<_> = said.iter().map(errors).collect();
        assert_eq!(errors[0], errors[1], "all say the same");
        assert_eq!(said[1].lines().count(), 1, "one speaks for all: {said:?}");
        errors[0].clone()
    };
    let differs = "edm2k: error: rank 1 differs from rank 0:";
    assert_eq!(said(&sample, &eval), format!("{differs} it was told to eval, rank 0 to sample"));
    assert_eq!(
        said(&sample, &sample.replace("0-3", "0-2,4")),
        format!("{differs} seeds is [0,1,2,4] there, [0,1,2,3] here")
    );
    let other = said(&sample, &sample.replace("steps 2", "steps 3"));
    assert_eq!(other, format!("{differs} parameters.sampler.steps is 3 there, 2 here"));
    let preset = sample.replace("--steps 2", "--preset edm2-img512-xs-fid");
    let other = said(&preset, &preset.replace("0-3", "0-2"));
    assert_eq!(other, format!("{differs} seeds is [0,1,2] there, [0,1,2,3] here"));
    assert!(!place.path("out").exists(), "nothing was begun");

    let (port, line) = (free_port(), options("run", 40));
    let lines = [&line, &format!("{line} --dry-run")];
    let mut ranks: Vec<_> =
        lines.iter().enumerate().map(|(rank, line)| place.rank(rank, 2, port, line).spawn().unwrap()).collect();
    ranks[1].wait().unwrap();
    let begun = Instant::now();
    let ended = outputs(ranks);
    let said = text(&ended[0]);
    assert!(said.contains("rank 1 (") && said.contains(") has ended already: was it given another command?"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(9), "nobody waits for a rank that has said goodbye");
    assert!(ended[1].status.success(), "{}", text(&ended[1]));
}

#[test]
fn what_the_launcher_says_wrongly_is_one_line() {
    let place = Place::new();
    let said = |change: fn(&mut Command) -> &mut Command| {
        let mut command = place.rank(1, 2, free_port(), &options("run", 40));
        command.env("EDM2K_RANKS_TIMEOUT", "1");
        change(&mut command);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(text(&output).lines().count(), 1, "{}", text(&output));
        text(&output)
    };
    assert!(said(|c| c.env("RANK", "2")).contains("error: RANK is '2', expected 0 to 1"));
    assert!(said(|c| c.env_remove("WORLD_SIZE")).contains("error: RANK is set, but WORLD_SIZE is not"));
    assert!(said(|c| c.env_remove("MASTER_ADDR")).contains("MASTER_ADDR is not"));
    assert!(said(|c| c.env("EDM2K_RANKS_TIMEOUT", "soon")).contains("EDM2K_RANKS_TIMEOUT is 'soon'"));
    assert!(said(|c| c).contains("rank 1 found no rank 0 at 127.0.0.1:"));
    let few = place.start(3, &options("run", 40).replace("--batch 10", "--batch 2"));
    for output in outputs(few) {
        let said = text(&output);
        assert!(said.contains("a batch of 2 images, expected one at least for each of 3 ranks"), "{said}");
    }
}

#[test]
fn ranks_and_parts_evaluate_as_one_process_does() {
    let place = Place::new();
    place.prepare_sizes("sizes", 0, &[[8, 8], [16, 8], [8, 16]]);
    place.run(1, &options("run", 40).replace("--data data", "--data sizes"));
    let models = fs::read_dir(place.path("run")).unwrap().map(|entry| entry.unwrap().path());
    let mut models: Vec<_> = models.filter(|path| path.display().to_string().contains("snapshot")).collect();
    models.sort();
    let eval = |model: &Path, more: &str| {
        // Batches of 4 do not go into the images, nor into parts of them.
        format!("eval --data sizes --device cpu --batch 4 --images 7 --model {} {more}", model.display())
    };
    let expected = place.run(1, &eval(&models[0], "--json"));
    assert_eq!(place.run(3, &eval(&models[0], "--json")), expected);

    let (port, ours) = (free_port(), eval(&models[0], ""));
    let lines = [&ours, &ours.replace("--images 7", "--images 5")];
    let ranks = lines.iter().enumerate().map(|(rank, line)| place.rank(rank, 2, port, line).spawn().unwrap());
    for output in outputs(ranks.collect()) {
        assert!(text(&output).contains("rank 1 differs from rank 0: images is 5 there, 7 here"), "{}", text(&output));
    }

    let part = |part: &str, more: &str| {
        let line = eval(&models[0], &format!("--outdir losses --plot losses.svg --part {part} {more}"));
        succeed(&mut place.rank(0, 1, 0, &line))
    };
    let said = part("3/3", "");
    assert!(said.starts_with("36 noisy images of 105: losses. Still missing: part 1/3, 2/3"), "{said}");
    assert!(part("1/3", "").contains("losses. Still missing: part 2/3"));
    assert!(!place.path("losses.svg").exists());
    // What another model lost is none of it.
    let other = eval(&models[1], "--outdir losses --part 1/3 --overwrite");
    assert!(succeed(&mut place.rank(0, 1, 0, &other)).contains("Still missing: part 2/3, 3/3 ("));
    let said = part("2/3", "");
    let why = "part 1/3 (losses/losses-1-of-3.safetensors is of something else: model is ";
    assert!(said.contains(why), "{said}");
    let fewer = eval(&models[0], "--outdir losses --part 1/3 --overwrite").replace("--images 7", "--images 5");
    succeed(&mut place.rank(0, 1, 0, &fewer));
    let said = part("2/3", "--overwrite");
    assert!(said.contains("is of something else: images is 5 there, 7 here)"), "{said}");
    fs::write(place.path("losses/losses-1-of-3.safetensors"), "damaged").unwrap();
    assert!(part("2/3", "--overwrite").contains("part 1/3 (losses/losses-1-of-3.safetensors: "));
    let fails = |line: &str| {
        let output = place.rank(0, 1, 0, line).output().unwrap();
        assert!(!output.status.success());
        text(&output)
    };
    let again = fails(&eval(&models[0], "--outdir losses --part 1/3"));
    assert!(again.contains("losses-1-of-3.safetensors exists; give --overwrite"), "{again}");
    assert_eq!(part("1/3", "--json --overwrite"), expected);
    assert!(fs::read_to_string(place.path("losses.svg")).unwrap().starts_with("<svg"));
    // Parts that end together: one of them prints and draws.
    for round in 0..8 {
        let line =
            |part| eval(&models[0], &format!("--json --outdir round-{round} --plot round-{round}.svg --part {part}"));
        let ranks = ["1/2", "2/2"].map(|part| place.rank(0, 1, 0, &line(part)).spawn().unwrap());
        let ended = outputs(ranks.into());
        ended.iter().for_each(|output| assert!(output.status.success(), "{round}: {}", text(output)));
        let tables = ended.iter().filter(|output| output.stdout == expected.as_bytes()).count();
        assert_eq!(tables, 1, "{round}: {ended:?}");
        assert!(place.path(&format!("round-{round}.svg")).exists());
    }
    // More parts than batches: some have nothing to do.
    let few = |part: &str| {
        let line = eval(&models[0], &format!("--json --outdir few --part {part}"));
        succeed(&mut place.rank(0, 1, 0, &line.replace("--batch 4 --images 7", "--batch 16 --images 1")))
    };
    assert!(few("1/2").contains("of 15: few. Still missing: part 2/2"));
    let whole = eval(&models[0], "--json").replace("--batch 4 --images 7", "--batch 16 --images 1");
    assert_eq!(few("2/2"), place.run(1, &whole));

    assert!(fails(&eval(&models[0], "--part 1/2")).contains("--outdir <DIR>"));
    assert!(fails(&eval(&models[0], "--outdir losses --part 3/2")).contains("is not a part"));
    for output in outputs(place.start(2, &eval(&models[0], "--outdir losses --part 1/2"))) {
        assert!(text(&output).contains("a launcher has started 2 ranks"), "{}", text(&output));
    }
}

// ---- sampling -------------------------------------------------------------------------------

#[test]
fn ranks_and_parts_make_the_files_that_one_process_makes() {
    let place = Place::new();
    let emoji = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/emoji.safetensors");
    // 11 images in batches of 2: six batches.
    let sample = |out: &str, more: &str| {
        format!(
            "sample --model {emoji} --device cpu --steps 2 --seeds 0-9,17 --tags heart --tags cat --batch 2 --outdir {out} {more}"
        )
    };
    place.run(1, &sample("one", ""));
    let expected = files(&place.path("one"));
    assert_eq!(expected.len(), 12, "with the grid");
    let same = |out: &str| {
        let found = files(&place.path(out));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        let differ: Vec<_> = found.keys().filter(|name| found[*name] != expected[*name]).collect();
        assert!(differ.is_empty(), "{differ:?}");
    };
    let said = place.run(3, &sample("ranks", ""));
    assert!(said.contains("11 images of 32x32"), "{said}");
    same("ranks");

    let part = |part: &str| succeed(&mut place.rank(0, 1, 0, &sample("parts", &format!("--part {part}"))));
    let said = part("3/3");
    assert!(said.contains("3 images of 11: parts. 8 are still missing, of part 1/3, 2/3"), "{said}");
    assert!(part("1/3").contains("4 are still missing, of part 2/3"));
    assert!(!place.path("parts/grid.png").exists());
    // One of another run is none of these.
    let (mine, other) = (place.path("parts/000001.png"), place.path("parts/000000.png"));
    let own = fs::read(&mine).unwrap();
    fs::copy(other, &mine).unwrap();
    assert!(part("2/3").contains("1 are still missing, of part 1/3"));
    fs::write(&mine, own).unwrap();
    fs::remove_file(place.path("parts/000007.png")).unwrap();
    fs::write(&mine, b"somebody's own").unwrap();
    let again = place.rank(0, 1, 0, &sample("parts", "--part 1/3")).output().unwrap();
    assert!(text(&again).contains("exists; give --overwrite"), "{}", text(&again));
    fs::remove_file(&mine).unwrap();
    assert!(part("2/3").contains("2 of 4 images are there"));
    assert!(part("1/3").contains("2 of 4 images are there"));
    succeed(&mut place.rank(0, 1, 0, &sample("parts", "--part 3/3 --overwrite")));
    same("parts");

    // Another model under the same name, on one rank or for one part.
    let mut model = Model::load(emoji).unwrap();
    for dir in ["a", "b"] {
        fs::create_dir(place.path(dir)).unwrap();
        model.save(place.path(dir).join("m.safetensors"), Stored::F16).unwrap();
        model.weights[0].iter_mut().for_each(|weight| *weight *= 1.5);
    }
    let of = |dir: &str, more: &str| sample("mixed", more).replace(emoji, &format!("{dir}/m.safetensors"));
    let port = free_port();
    let ranks = ["a", "b"].into_iter().enumerate();
    let ranks = ranks.map(|(rank, dir)| place.rank(rank, 2, port, &of(dir, "")).spawn().unwrap());
    for output in outputs(ranks.collect()) {
        let said = text(&output);
        assert!(said.contains("rank 1 differs from rank 0: files.model is m.safetensors ("), "{said}");
    }
    assert!(!place.path("mixed").exists(), "nothing was begun");
    succeed(&mut place.rank(0, 1, 0, &of("a", "--part 1/2")));
    let said = succeed(&mut place.rank(0, 1, 0, &of("b", "--part 2/2")));
    assert!(said.contains("6 are still missing, of part 1/2 (of something else: hashes.model is "), "{said}");
    succeed(&mut place.rank(0, 1, 0, &of("b", "--part 1/2 --overwrite")));
    let names: Vec<_> = files(&place.path("mixed")).into_keys().collect();
    assert!(names.iter().eq(expected.keys()), "{names:?}");
    // The same once all are there. A part that is made again of the same files changes nothing.
    let before = files(&place.path("mixed"));
    assert!(succeed(&mut place.rank(0, 1, 0, &of("b", "--part 2/2 --overwrite"))).contains("11 images of 32x32"));
    assert!(files(&place.path("mixed")) == before);
    let why = "5 are still missing, of part 2/2 (of something else: hashes.model is ";
    for _ in 0..2 {
        let said = succeed(&mut place.rank(0, 1, 0, &of("a", "--part 1/2 --overwrite")));
        assert!(said.contains(why), "{said}");
    }
    let said = succeed(&mut place.rank(0, 1, 0, &of("a", "--part 2/2 --overwrite")));
    assert!(said.contains("11 images of 32x32"), "{said}");
    assert!(files(&place.path("mixed")).keys().eq(expected.keys()));

    for (wrong, why) in [("0/3", "is not a part"), ("4/3", "is not a part"), ("2", "is not a part")] {
        let output = place.rank(0, 1, 0, &sample("wrong", &format!("--part {wrong}"))).output().unwrap();
        assert!(!output.status.success() && text(&output).contains(why), "{}", text(&output));
    }
    let ranks = outputs(place.start(2, &sample("wrong", "--part 1/2")));
    ranks
        .iter()
        .for_each(|output| assert!(text(output).contains("a launcher has started 2 ranks"), "{}", text(output)));
}

/// Latents go into one file, whoever makes them.
#[test]
fn ranks_and_parts_make_the_latents_that_one_process_makes() {
    let place = Place::empty();
    let mut model = Model::init(&latents(), 3).unwrap();
    model.meta = ModelMeta { height: 8, width: 16, encoder: ImageSpace::SdVae, ..model.meta };
    let path = place.path("model.safetensors");
    model.save(&path, Stored::F32).unwrap();
    let mut other = Model::init(&latents(), 4).unwrap();
    other.meta = model.meta.clone();
    // What begins at 0 makes all fresh networks alike.
    other.weights[other.table.find("unet.out_gain").unwrap().0] = vec![1.0];
    // 5 batches.
    let sample = |out: &str, more: &str| {
        format!(
            "sample --model model.safetensors --device cpu --steps 3 --guidance 1 --seeds 0-8,17 --batch 2 --outdir {out} {more}"
        )
    };
    for steps in ["", "--save-steps"] {
        let name = |of: &str| format!("{of}{steps}");
        place.run(1, &sample(&name("one"), steps));
        let expected = files(&place.path(&name("one")));
        assert_eq!(expected.keys().collect::<Vec<_>>(), ["latents.safetensors"]);
        let same = |out: &str| assert!(files(&place.path(&name(out))) == expected, "{out}");
        let said = place.run(3, &sample(&name("ranks"), steps));
        assert!(said.contains("10 images of 16x8"), "{said}");
        same("ranks");

        let line = |part: &str, more: &str| sample(&name("parts"), &format!("{steps} --part {part} {more}"));
        let part = |part: &str, more: &str| succeed(&mut place.rank(0, 1, 0, &line(part, more)));
        let said = part("3/3", "");
        assert!(
            said.contains("4 images of 10: parts") && said.contains("6 are still missing, of part 1/3, 2/3"),
            "{said}"
        );
        assert!(part("1/3", "").contains("4 are still missing, of part 2/3"));
        assert!(!place.path(&name("parts")).join("latents.safetensors").exists());
        // Those that are there are not made again.
        assert!(part("1/3", "").contains("2 of 2 images are there"));
        // Those of other seeds are none of these.
        let seeds = line("1/3", "").replace("0-8,17", "1-9,17");
        let refused = place.rank(0, 1, 0, &seeds).output().unwrap();
        assert!(
            text(&refused)
                .contains("latents-1-of-3.safetensors exists, of something else: other seeds; give --overwrite"),
            "{}",
            text(&refused)
        );
        let seeds = format!("{seeds} --overwrite");
        assert!(succeed(&mut place.rank(0, 1, 0, &seeds)).contains("8 are still missing, of part 2/3, 3/3"));
        assert!(part("2/3", "").contains("2 are still missing, of part 1/3"));
        part("1/3", "--overwrite");
        same("parts");
        assert!(part("2/3", "").contains("images are there"));
        same("parts");
        // It is there already, and stays; of another model under the same name it is none.
        part("2/3", "--overwrite");
        same("parts");
        let weights = fs::read(&path).unwrap();
        other.save(&path, Stored::F32).unwrap();
        assert!(part("2/3", "--overwrite").contains("6 are still missing, of part 1/3, 3/3"));
        assert!(place.path(&name("parts")).join("latents-2-of-3.safetensors").exists());
        part("1/3", "--overwrite");
        part("3/3", "--overwrite");
        assert!(files(&place.path(&name("parts"))).keys().eq(expected.keys()));
        assert!(files(&place.path(&name("parts"))) != expected);
        fs::write(&path, weights).unwrap();

        // More parts than batches: the first has no image, and need not be begun.
        for (out, parts) in [("many", 1..=6), ("few", 2..=6)] {
            for number in parts {
                let line = sample(&name(out), &format!("{steps} --part {number}/6"));
                succeed(&mut place.rank(0, 1, 0, &line));
            }
            same(out);
            // A copy that somebody made is no file of a part, though it begins like one.
            let [all, copy] =
                ["latents", "latents-copy"].map(|file| place.path(&name(out)).join(file).with_extension("safetensors"));
            fs::copy(all, &copy).unwrap();
            succeed(&mut place.rank(0, 1, 0, &sample(&name(out), &format!("{steps} --part 3/6 --overwrite"))));
            fs::remove_file(copy).unwrap();
            same(out);
        }
    }

    // Parts that keep their steps are none of those that keep none, nor is a row of images that leads to another seed.
    let part = |out: &str, arguments: &str| succeed(&mut place.rank(0, 1, 0, &sample(out, arguments)));
    part("mixed", "--part 1/2 --save-steps");
    let said = part("mixed", "--part 2/2");
    assert!(said.contains("of part 1/2 (of something else: save_steps is true there, false here)"), "{said}");
    let row = |to: &str, number: u8| {
        let line = sample("row", &format!("--interpolate 10 --part {number}/2")).replace("0-8,17", to);
        succeed(&mut place.rank(0, 1, 0, &line))
    };
    row("7,9", 1);
    let said = row("7,11", 2);
    assert!(said.contains("of part 1/2 (of something else: towards"), "{said}");
}

/// A network of latents, unconditional.
fn latents() -> Config {
    serde_json::from_value(json!({
        "img_resolution": 16, "img_channels": 4, "label_dim": 0, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [], "channels_per_head": 8,
    }))
    .unwrap()
}

// ---- preparing ------------------------------------------------------------------------------

#[test]
fn ranks_and_parts_prepare_the_dataset_that_one_process_prepares() {
    let place = Place::new();
    fs::create_dir(place.path("pictures")).unwrap();
    let mut lines = String::new();
    for id in 0..23u8 {
        let picture = image::RgbImage::from_fn(8, 8, |x, y| image::Rgb([10 * id, 16 * x as u8, 16 * y as u8]));
        picture.save(place.path(&format!("pictures/{id}.png"))).unwrap();
        lines += &format!("{}\n", json!({"id": id, "file": format!("{id}.png"), "tags": [format!("t{}", id % 3)]}));
    }
    fs::write(place.path("pictures/22.png"), "no picture").unwrap();
    fs::write(place.path("all.jsonl"), lines).unwrap();
    let prepare = |out: &str, more: &str| {
        let from = "prepare --images pictures --metadata all.jsonl --size 8x8 --shard-size 4 --validation-modulus 7";
        format!("{from} --out {out} {more}")
    };
    let whole = place.run(1, &prepare("one", ""));
    let expected = files(&place.path("one"));
    assert_eq!(expected.len(), 8, "{:?}", expected.keys());
    let same = |out: &str| {
        let found = files(&place.path(out));
        let differ: Vec<_> = found.iter().zip(&expected).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect();
        assert!(found.len() == expected.len() && differ.is_empty(), "{differ:?}");
    };
    let ended = outputs(place.start(3, &prepare("ranks", "")));
    ended.iter().for_each(|output| assert!(output.status.success(), "{}", text(output)));
    // Rank 0 speaks for all, and whoever finds something wrong.
    let said = text(&ended[0]);
    let wrong: Vec<_> = ended[1..].iter().map(text).filter(|said| !said.is_empty()).collect();
    assert!(wrong.len() == 1 && wrong[0].starts_with("unreadable: 22.png: "), "{wrong:?}");
    let of_all = |said: &str| said.lines().filter(|line| line.starts_with("  ")).map(str::to_owned).collect::<Vec<_>>();
    assert!(of_all(&said) == of_all(&whole) && of_all(&said).len() == 5, "{said}\n{whole}");
    same("ranks");

    // Nothing is made of other records, or with other options.
    let fewer = fs::read_to_string(place.path("all.jsonl")).unwrap();
    fs::write(place.path("fewer.jsonl"), fewer.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>())
        .unwrap();
    for (change, why) in [
        (("all.jsonl", "fewer.jsonl"), "metadata is fewer.jsonl ("),
        (("--size 8x8", "--size 8x8 --background #000000"), "background is [0,0,0] there, [255,255,255] here"),
    ] {
        let (port, ours) = (free_port(), prepare("unlike", ""));
        let lines = [&ours, &ours.replace(change.0, change.1)];
        let ranks = lines.iter().enumerate().map(|(rank, line)| place.rank(rank, 2, port, line).spawn().unwrap());
        for output in outputs(ranks.collect()) {
            assert!(text(&output).contains(&format!("rank 1 differs from rank 0: {why}")), "{}", text(&output));
        }
        assert!(!place.path("unlike").exists(), "nothing was begun");
    }

    let part = |part: &str| succeed(&mut place.rank(0, 1, 0, &prepare("parts", &format!("--part {part}"))));
    let said = part("3/3");
    assert!(said.contains("of part 3/3: parts. Shards of part 1/3, 2/3 are still missing"), "{said}");
    assert!(!place.path("parts/summary.json").exists());
    // Tags that somebody renames meanwhile stay so.
    let vocabulary = fs::read_to_string(place.path("parts/vocabulary.json")).unwrap();
    fs::write(place.path("parts/vocabulary.json"), vocabulary.replace("t1", "one")).unwrap();
    assert!(part("1/3").contains("Shards of part 2/3 are still missing"));
    assert!(fs::read_to_string(place.path("parts/vocabulary.json")).unwrap().contains("\"one\""));
    fs::write(place.path("parts/vocabulary.json"), vocabulary).unwrap();
    assert!(Dataset::open(&place.path("parts"), Split::Train).is_err(), "a shard is missing");
    let fails = |line: &str| {
        let output = place.rank(0, 1, 0, line).output().unwrap();
        assert!(!output.status.success());
        text(&output)
    };
    let other = fails(&prepare("parts", "--part 2/3 --background #000000"));
    assert!(other.contains("made before with background #ffffff, now #000000"), "{other}");
    assert_eq!(of_all(&part("2/3")), of_all(&whole));
    same("parts");
    // A shard that is lost is made by its part again, and the others make nothing.
    fs::remove_file(place.path("parts/train-00001.safetensors")).unwrap();
    assert!(part("1/3").contains("Shards of part 2/3 are still missing"));
    part("2/3");
    same("parts");

    // A damaged one is its part's to make again, and no other fails for it.
    let (shard, damaged) = (place.path("parts/train-00000.safetensors"), place.path("ranks/train-00000.safetensors"));
    let mut bytes = fs::read(&shard).unwrap();
    let ids = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    bytes[ids + 1] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    fs::write(&damaged, &bytes).unwrap();
    assert!(part("2/3").contains("Shards of part 1/3 are still missing"));
    part("1/3");
    same("parts");
    outputs(place.start(3, &prepare("ranks", ""))).iter().for_each(|output| assert!(output.status.success()));
    same("ranks");

    assert!(fails(&prepare("wrong", "--part 4/3")).contains("is not a part"));
    assert!(fails(&prepare("wrong", "--part 1/2 --add")).contains("cannot be used with"));
    for output in outputs(place.start(2, &prepare("one", "--add"))) {
        assert!(text(&output).contains("--add and --retag are done by one process"), "{}", text(&output));
    }
}
