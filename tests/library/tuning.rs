//! `edm2k tune`: that a plan takes the tiles of a table, that the fastest are found, and the command itself.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use edm2k::backend::gpu::engine::{Gpu, Trial};
use edm2k::backend::gpu::launch::{Launch, Precision, TensorMap, TensorMapSpec};
use edm2k::backend::gpu::runtime::{Command, Graph, Imagined, MeasuredOn, Memory, Runtime};
use edm2k::backend::gpu::tiles::{Card, Choice, Question, Tuned};
use edm2k::backend::{BackendError, DeviceError};
use edm2k::model::Precond;
use edm2k::params::ParamTable;
use edm2k::train::{MicroBatchPlan, rehearse};
use edm2k::tuning::Table;

/// Seconds of a launch, by how many times were asked for before.
type Seconds = dyn Fn(&Launch, usize) -> f64;

/// An imagined device that keeps what it is given to run, and whose times are made up.
struct Watched {
    device: Imagined,
    /// Of the last graph that ran.
    ran: Rc<RefCell<Vec<Launch>>>,
    seconds: Box<Seconds>,
    asked: RefCell<usize>,
}

impl Watched {
    fn new(tuned: Option<Tuned>, seconds: impl Fn(&Launch, usize) -> f64 + 'static) -> Rc<Self> {
        let device = Imagined::new(Card::new(24, 89));
        let device = match tuned {
            Some(tuned) => device.tuned_by(tuned),
            None => device,
        };
        Rc::new(Self { device, ran: Rc::default(), seconds: Box::new(seconds), asked: RefCell::default() })
    }
}

struct Given {
    launches: Vec<Launch>,
    ran: Rc<RefCell<Vec<Launch>>>,
}

impl Graph for Given {
    fn run(&self) -> Result<(), DeviceError> {
        self.ran.borrow_mut().clone_from(&self.launches);
        Ok(())
    }
}

impl Runtime for Watched {
    fn card(&self) -> Card {
        self.device.card()
    }
    fn origin(&self) -> MeasuredOn {
        self.device.origin()
    }
    fn tuned(&self) -> Option<Rc<Tuned>> {
        self.device.tuned()
    }
    fn name(&self) -> String {
        self.device.name()
    }
    fn free(&self) -> Option<u64> {
        None
    }
    fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Rc<dyn Memory>, DeviceError> {
        self.device.allocate(bytes, purpose)
    }
    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap, DeviceError> {
        self.device.tensor_map(spec)
    }
    unsafe fn run(&self, _: &Command) -> Result<(), DeviceError> {
        Ok(())
    }
    unsafe fn record(&self, commands: Vec<Command>, _: bool) -> Result<Box<dyn Graph>, DeviceError> {
        let launch = |command| if let Command::Launch(launch) = command { Some(launch) } else { None };
        let launches = commands.into_iter().filter_map(launch).collect();
        Ok(Box::new(Given { launches, ran: self.ran.clone() }))
    }
    fn time(&self, work: &dyn Graph, _: &dyn Graph, repeats: usize) -> Result<Vec<f64>, DeviceError> {
        work.run()?;
        let ran = self.ran.borrow();
        let first = self.asked.replace_with(|&mut asked| asked + repeats);
        Ok((first..first + repeats).map(|i| ran.iter().map(|launch| (self.seconds)(launch, i)).sum()).collect())
    }
}

/// Two levels of different widths, at an odd size: products of 64 channels and of others, of one tap and of nine.
fn network() -> (Precond, ParamTable) {
    let config = serde_json::json!({
        "img_resolution": 16, "img_channels": 4, "label_dim": 24, "model_channels": 64, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 64,
    });
    Precond::new(&serde_json::from_value(config).unwrap()).unwrap()
}

const KEY: MicroBatchPlan = MicroBatchPlan { dropout: 0.0 };

/// A micro-batch of three images.
fn train(gpu: &mut Gpu, net: &Precond) -> Result<(), BackendError> {
    rehearse(gpu, net, 0.0, [3, 20, 12])
}

/// What a micro-batch launches, with a table or none.
fn launches(tuned: Option<Tuned>) -> Vec<Launch> {
    let (net, table) = network();
    let runtime = Watched::new(tuned, |_, _| 0.0);
    let mut gpu = Gpu::for_training(runtime.clone(), Precision::F16, &table, 0).unwrap();
    train(&mut gpu, &net).unwrap();
    let ran = runtime.ran.borrow();
    ran.clone()
}

/// What is found where a launch takes such a time.
fn trials(known: &HashSet<Question>, seconds: impl Fn(&Launch, usize) -> f64 + 'static) -> Vec<Trial> {
    let (net, table) = network();
    let mut gpu = Gpu::for_training(Watched::new(None, seconds), Precision::F16, &table, 0).unwrap();
    let mut told = Vec::new();
    let mut passed = |done, of| told.push((done, of));
    let known = |question: &Question| known.contains(question);
    let found = gpu.try_tiles(&KEY, 5, &mut |gpu| train(gpu, &net), &known, &mut passed).unwrap();
    assert!(told.iter().enumerate().all(|(i, &(done, of))| done == i + 1 && of == told.len()), "{told:?}");
    found
}

/// Whether a launch is of a convolution.
fn is_product(launch: &Launch) -> bool {
    let name = launch.kernel.rsplit('_').next().unwrap();
    launch.kernel.starts_with("conv_") && name.split_once('x').is_some_and(|(m, _)| m.parse::<u32>().is_ok())
}

#[test]
fn a_table_s_choice_is_taken_by_exactly_the_plan_s_products_of_that_size() {
    let usual = launches(None);
    let all = trials(&HashSet::new(), |_, _| 1.0);
    assert!(all.len() > 20, "{}", all.len());
    let counted: usize = all.iter().map(|trial| trial.count).sum();
    assert_eq!(counted, usual.iter().filter(|launch| is_product(launch)).count(), "every product is tried");
    let kinds: HashSet<String> = all.iter().map(|trial| trial.question.kernels.to_string()).collect();
    for kind in ["fprop", "dgrad", "wgrad"] {
        assert!(kinds.contains(&format!("conv_{kind}_f16x2")), "{kinds:?}");
    }
    assert!(kinds.contains("conv_fprop_f16x2_flat"), "{kinds:?}");
    assert_eq!(launches(Some(Tuned::default())), usual);
    for trial in &all {
        let kernels = trial.question.kernels;
        let others = trial.question.candidates(Card::new(24, 89));
        for choice in others.iter().filter(|choice| choice.tile != trial.model.0.tile).take(3) {
            let tuned = Tuned::from_iter([(trial.question, *choice)]);
            let changed = launches(Some(tuned));
            let products = |launches: &[Launch]| launches.iter().filter(|l| is_product(l)).cloned().collect::<Vec<_>>();
            let (before, after) = (products(&usual), products(&changed));
            assert_eq!(before.len(), after.len());
            let mut count = 0;
            for (before, after) in before.iter().zip(&after).filter(|(before, after)| before.kernel != after.kernel) {
                assert_eq!(before.kernel, kernels.instance(trial.model.0.tile));
                assert_eq!(after.kernel, kernels.instance(choice.tile));
                assert_eq!(after.grid[2] as usize, choice.splits);
                count += 1;
            }
            assert_eq!(count, trial.count, "{:?}", trial.question);
        }
    }
}

/// Every tile's time is its own, and so is that of every number of parts: the fastest is known beforehand.
#[test]
fn the_fastest_choice_is_found() {
    let fastest = |candidates: &[Choice], wanted: &dyn Fn(&Choice) -> bool| candidates.iter().copied().find(wanted);
    let is_wanted = |choice: &Choice| choice.tile.to_string() == "64x64" && choice.splits == 3;
    let seconds = |launch: &Launch, i: usize| {
        let wanted = launch.kernel.ends_with("_64x64") && launch.grid[2] == 3;
        // Noise of a tenth, less than what there is to gain.
        let noise = 1.0 + 0.02 * ((i * 7) % 6) as f64;
        if is_product(launch) { if wanted { 0.5e-5 * noise } else { 1e-5 * noise } } else { 0.0 }
    };
    let found = trials(&HashSet::new(), seconds);
    let mut table = Table::new(Watched::new(None, |_, _| 0.0).origin());
    let mut taken = 0;
    for trial in &found {
        let candidates = trial.question.candidates(Card::new(24, 89));
        assert_eq!(trial.model.0, candidates[0]);
        match fastest(&candidates, &is_wanted) {
            Some(choice) => {
                assert_eq!(trial.fastest.0, choice, "{:?}", trial.question);
                assert_eq!((trial.model.1.len(), trial.fastest.1.len()), (10, 10));
                let another = choice != trial.model.0;
                assert_eq!(table.take(trial), another, "{trial:?}");
                taken += usize::from(another);
            }
            None => assert!(!table.take(trial), "by nothing but noise: {trial:?}"),
        }
    }
    assert!(taken > 3 && table.len() == taken, "{taken}");
    assert_ne!(launches(Some(table.tuned().unwrap())), launches(None));

    // The same, of products that are not known yet.
    let known: HashSet<Question> = found.iter().skip(2).map(|trial| trial.question).collect();
    let left: Vec<Question> = trials(&known, seconds).iter().map(|trial| trial.question).collect();
    assert_eq!(left, [found[0].question, found[1].question]);
}

/// A choice that was the fastest once, by accident, is measured again, and is not then.
#[test]
fn an_accident_is_no_gain() {
    // Whatever is timed for the first time is twice as fast as it is later.
    let rounds = RefCell::new(HashMap::<String, usize>::new());
    let seconds = move |launch: &Launch, i: usize| {
        let mut rounds = rounds.borrow_mut();
        let seen = rounds.entry(format!("{} {:?}", launch.kernel, launch.grid)).or_insert(i);
        let accident = i < *seen + 5 && !launch.kernel.ends_with("128x128");
        match accident {
            _ if !is_product(launch) => 0.0,
            true => 0.5e-5,
            false => 1e-5,
        }
    };
    let found = trials(&HashSet::new(), seconds);
    assert!(found.iter().any(|trial| trial.fastest.0 != trial.model.0));
    let mut table = Table::new(Watched::new(None, |_, _| 0.0).origin());
    assert!(found.iter().all(|trial| !table.take(trial)));
}

/// Whatever was chosen before is chosen after a measurement, also one that failed.
#[test]
fn a_measurement_leaves_the_device_as_it_was() {
    let (net, table) = network();
    let trial = trials(&HashSet::new(), |_, _| 1.0).remove(0);
    let others = trial.question.candidates(Card::new(24, 89));
    let choice = others.into_iter().find(|choice| choice.tile != trial.model.0.tile).unwrap();
    let runtime = Watched::new(Some(Tuned::from_iter([(trial.question, choice)])), |_, _| 1.0);
    let mut gpu = Gpu::for_training(runtime.clone(), Precision::F16, &table, 0).unwrap();
    train(&mut gpu, &net).unwrap();
    // Whatever memory they are in.
    let ran = || runtime.ran.borrow().iter().map(|launch| (launch.kernel.clone(), launch.grid)).collect::<Vec<_>>();
    let before = ran();
    gpu.try_tiles(&KEY, 1, &mut |gpu| train(gpu, &net), &|_| false, &mut |_, _| {}).unwrap();
    train(&mut gpu, &net).unwrap();
    assert_eq!(ran(), before);
    let mut calls = 0;
    let failing = &mut |gpu: &mut Gpu| {
        calls += 1;
        if calls < 3 { train(gpu, &net) } else { Err(DeviceError::Unavailable("a test".into()).into()) }
    };
    let failed: Result<Vec<Trial>, BackendError> = gpu.try_tiles(&KEY, 1, failing, &|_| false, &mut |_, _| {});
    assert!(failed.unwrap_err().to_string().contains("a test"));
    train(&mut gpu, &net).unwrap();
    assert_eq!(ran(), before);
}

#[cfg(feature = "cli")]
mod on_the_command_line {
    use crate::common::command::{here, refused_in_one_line};

    #[test]
    fn without_a_gpu_it_is_one_line() {
        let said = refused_in_one_line(here(&["tune", "--device", "cpu"]).assert());
        assert!(said.contains("tune measures a GPU's kernels"), "{said}");
        let said = refused_in_one_line(here(&["tune", "--device", "cpu", "--model", "nowhere.safetensors"]).assert());
        assert!(said.contains("nowhere.safetensors"), "{said}");
        let said = refused_in_one_line(here(&["tune", "--device", "cpu", "--size", "65x88"]).assert());
        assert!(said.contains("65x88"), "{said}");
    }

    /// All of it on the emulator, whose times say nothing but are times.
    #[cfg(feature = "emulator")]
    #[test]
    fn it_measures_writes_and_measures_more() {
        use super::{Precision, Runtime, Table, Trial};
        use crate::common::command::printed;
        use edm2k::backend::gpu::conv::{ConvShape, Fprop};
        use edm2k::backend::gpu::emulated::{Build, Emulated, Emulator};
        use edm2k::model::Model;
        use edm2k::model::file::Stored;
        use edm2k::tuning;

        let dir = tempfile::tempdir().unwrap();
        let config = serde_json::from_value(serde_json::json!({
            "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_channels": 64, "channel_mult": [1],
            "num_blocks": 1, "attn_resolutions": [], "channels_per_head": 64,
        }))
        .unwrap();
        let model = Model::init(&config, 0).unwrap();
        let path = dir.path().join("tiny.safetensors");
        model.save(&path, Stored::F16).unwrap();
        let tune = |more: &[&str]| {
            let path = path.to_str().unwrap();
            let arguments = ["tune", "--device", "emulated", "--model", path, "--repeats", "1"];
            let mut command = here(&[&arguments, more].concat());
            command.env("XDG_CACHE_HOME", dir.path());
            printed(command.assert())
        };
        let device = Emulated::new(Emulator::new(Build::Normal).unwrap(), u64::MAX);
        let written = tuning::path_in(&dir.path().join("edm2k"), &device.origin());
        let said = tune(&["--batch", "1", "--dry-run"]);
        assert!(said.contains("forward, batch 1: ") && said.contains("forward, batch 2: "), "{said}");
        assert!(said.contains("conv_fprop_f16_flat") && said.contains("together"), "{said}");
        assert!(!written.exists() && !said.contains("tiles-"), "{said}");

        let said = tune(&["--batch", "1"]);
        assert!(said.contains(written.to_str().unwrap()), "{said}");
        let mut first = Table::read(&written).unwrap().unwrap();
        assert_eq!(first.origin, device.origin());
        // As if another network had been measured: a size that this one has not.
        let shape = ConvShape { n: 1, h: 40, w: 24, ca: 64, cb: 0, cout: 128, taps: 9 };
        let question = Fprop::new(shape, Precision::F16.into(), device.card()).unwrap().question();
        let [model, fastest] = [0, 1].map(|i| (question.candidates(device.card())[i], vec![(2 - i) as f64; 4]));
        assert!(first.take(&Trial { question, count: 1, model, fastest }));
        first.write(&written).unwrap();
        // With training, what was known of other sizes stays; and only the table is left in the directory.
        let said = tune(&["--batch", "3", "--batch-gpu", "3"]);
        assert!(said.contains("training, batch 3: ") && said.contains("conv_wgrad_f16"), "{said}");
        let second = Table::read(&written).unwrap().unwrap();
        assert!(second.tuned().unwrap().has(&question));
        assert_eq!(std::fs::read_dir(dir.path().join("edm2k")).unwrap().count(), 1);
    }
}
