//! The command line of edm2k.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod cli;

/// Train and sample EDM2 diffusion models.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(cli::bench::BenchArgs),
    Condition(cli::condition::ConditionArgs),
    Ema(cli::ema::EmaArgs),
    Eval(Box<cli::eval::EvalArgs>),
    Export(cli::export::ExportArgs),
    Import(cli::import::ImportArgs),
    Info(cli::info::InfoArgs),
    Prepare(Box<cli::prepare::PrepareArgs>),
    Sample(Box<cli::sample::SampleArgs>),
    Train(Box<cli::train::TrainArgs>),
    Verify(cli::verify::VerifyArgs),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // A reader that went away ends what it was reading, but not a training run.
    if !matches!(command, Command::Train(_)) {
        sigpipe::reset();
    }
    let result = match command {
        Command::Bench(args) => cli::bench::run(args),
        Command::Condition(args) => cli::condition::run(args),
        Command::Ema(args) => cli::ema::run(args),
        Command::Eval(args) => cli::eval::run(*args),
        Command::Export(args) => cli::export::run(args),
        Command::Import(args) => cli::import::run(args),
        Command::Info(args) => cli::info::run(args),
        Command::Prepare(args) => cli::prepare::run(*args),
        Command::Sample(args) => cli::sample::run(*args),
        Command::Train(args) => cli::train::run(*args),
        Command::Verify(args) => cli::verify::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
            eprintln!("edm2k: error: {}", causes.join(": "));
            ExitCode::FAILURE
        }
    }
}
