//! What the engine's plans cost, found out without a GPU.

use std::rc::Rc;

use edm2k::backend::gpu::engine::{Cost, Gpu};
use edm2k::backend::gpu::launch::Precision;
use edm2k::backend::gpu::runtime::Imagined;
use edm2k::model::Precond;
use edm2k::model::config::preset;
use edm2k::train::rehearse;

fn network_of_1girl_xs(batch: usize) -> (usize, Cost) {
    let preset = preset("1girl-xs").unwrap();
    let (net, table) = Precond::new(&preset.config).unwrap();
    let runtime = Rc::new(Imagined::rtx_4090());
    let mut gpu = Gpu::for_training(runtime, Precision::F16, &table, 2).unwrap();
    rehearse(&mut gpu, &net, 0.0, [batch, preset.size[0], preset.size[1]]).unwrap();
    let cost = gpu.costs().next().unwrap();
    (gpu.param_bytes(), cost)
}

/// EDM2-XS at 64x88, 40 images at a time, two moving averages: a GeForce card of 16 GB trains it.
#[test]
fn training_1girl_xs_fits_16_gb() {
    let (parameters, cost) = network_of_1girl_xs(40);
    println!("parameters {parameters}, {cost:?}");
    let total = (parameters + cost.workspace) as f64;
    assert!(total < 15e9, "{total} bytes, {cost:?}");
    // And it is a whole plan: half the parameters' bytes move several times, the activations more often.
    assert!(cost.launches > 500 && cost.bytes > 10_000_000_000, "{cost:?}");
}

#[test]
fn activations_grow_with_the_batch_and_parameters_do_not() {
    let ((one, a), (two, b)) = (network_of_1girl_xs(1), network_of_1girl_xs(4));
    println!("{a:?}\n{b:?}");
    assert_eq!(one, two);
    assert!((2 * a.workspace..5 * a.workspace).contains(&b.workspace), "{a:?}, {b:?}");
}

/// Each size of images has a plan of its own, all in one workspace: that of the largest.
#[test]
fn sizes_have_a_plan_each_in_one_workspace() {
    let preset = preset("1girl-xs").unwrap();
    let (net, table) = Precond::new(&preset.config).unwrap();
    let planned = |sizes: &[[usize; 2]]| {
        let runtime = Rc::new(Imagined::rtx_4090());
        let mut gpu = Gpu::for_training(runtime, Precision::F16, &table, 2).unwrap();
        for [height, width] in sizes {
            rehearse(&mut gpu, &net, 0.0, [4, *height, *width]).unwrap();
        }
        gpu.costs().map(|cost| cost.workspace).collect::<Vec<_>>()
    };
    let [large, small] = [planned(&[[88, 64]])[0], planned(&[[64, 64]])[0]];
    assert!(small < large);
    // The larger one's workspace takes the place of the smaller one's, whose plan is made anew when it is needed.
    let all = planned(&[[64, 64], [88, 64], [64, 64], [88, 64], [64, 64]]);
    assert_eq!(all, [large, small]);
}

/// Networks that the CPU takes and the kernels do not: a line that says why, no panic.
#[test]
fn what_the_kernels_cannot_do_is_said() {
    let refused = |json: serde_json::Value, averages: usize| {
        let config = serde_json::from_value(json).unwrap();
        let (net, table) = Precond::new(&config).unwrap();
        let runtime = Rc::new(Imagined::rtx_4090());
        match Gpu::for_training(runtime, Precision::F16, &table, averages) {
            Err(why) => why.to_string(),
            Ok(mut gpu) => rehearse(&mut gpu, &net, 0.0, [1, 8, 8]).unwrap_err().to_string(),
        }
    };
    let network = |channels: usize, head: usize, dim: usize| {
        serde_json::json!({
            "img_resolution": 8, "img_channels": 3, "label_dim": dim, "model_channels": channels,
            "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": head,
        })
    };
    for (config, averages, words) in [
        (network(20, 20, 0), 1, "pixel norm of 20 channels"),
        (network(48, 24, 0), 1, "heads of 24 channels"),
        (network(1792, 64, 0), 1, "1792 noise channels"),
        (network(16, 16, 40_000), 1, "rows of 40000 values"),
        (network(16, 16, 0), 5, "5 moving averages"),
    ] {
        let found = refused(config, averages);
        assert!(found.contains(words), "{found}, expected {words}");
    }
}

/// The way from the paper to the kernels, in docs/kernels.md, names operations and kernels that there are.
#[test]
fn the_documented_operations_and_kernels_exist() {
    let docs = include_str!("../../docs/kernels.md");
    let table = docs.split("## From the paper to a kernel").nth(1).unwrap();
    let traits = [
        include_str!("../../src/backend/mod.rs"),
        include_str!("../../src/backend/network.rs"),
        include_str!("../../src/backend/training.rs"),
        include_str!("../../src/backend/codec.rs"),
    ];
    let counted = include_str!("../data/kernels.tsv");
    let kernels: Vec<&str> = counted.lines().filter_map(|line| line.split('\t').next()).collect();
    let mut named = 0;
    for row in table.lines().filter(|line| line.starts_with("| ") && !line.contains("in the paper")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
        for operation in quoted(cells[2]) {
            let declared =
                |text: &&str| [format!("fn {operation}("), format!("fn {operation}<")].iter().any(|f| text.contains(f));
            assert!(traits.iter().any(declared), "no operation {operation}: {row}");
            named += 1;
        }
        for kernel in quoted(cells[3]) {
            let there = |name: &&str| name.starts_with(kernel.trim_end_matches('*'));
            assert!(kernels.iter().any(there), "no kernel {kernel}: {row}");
            named += 1;
        }
    }
    assert!(named > 50, "{named}");
}
