//! The command line of edm2k.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod cli;

use cli::Ended;
use cli::say::{self, note};

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
    Fid(Box<cli::fid::FidArgs>),
    Import(cli::import::ImportArgs),
    Info(cli::info::InfoArgs),
    Prepare(Box<cli::prepare::PrepareArgs>),
    Sample(Box<cli::sample::SampleArgs>),
    #[cfg(feature = "serve")]
    Serve(Box<cli::serve::ServeArgs>),
    Train(Box<cli::train::TrainArgs>),
    Tune(cli::tune::TuneArgs),
    Verify(cli::verify::VerifyArgs),
}

fn main() -> ExitCode {
    // The library leaves signals and the panic hook to its programs.
    edm2k::formats::mapped::end_on_lost_page();
    #[cfg(feature = "onnx")]
    edm2k::onnx::hush_panics();
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(error) => return refuse(&error),
    };
    let result = run(command);
    let printed = say::printed();
    match (result, printed) {
        (Ok(Ended::Done), Ok(())) => ExitCode::SUCCESS,
        (Ok(Ended::Stopped), Ok(())) => ExitCode::from(130),
        (Ok(ended), Err(why)) => {
            let what = if ended == Ended::Done { "all was done" } else { "it was stopped" };
            note!("edm2k: error: {what}, but the results could not be printed: {why}");
            ExitCode::FAILURE
        }
        (Err(error), _) => {
            note!("edm2k: error: {}", cli::advice::in_one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<Ended> {
    match command {
        Command::Bench(args) if args.picture => cli::picture::run(&args),
        Command::Bench(args) => cli::bench::run(args),
        Command::Condition(args) => return cli::condition::run(args),
        Command::Ema(args) => cli::ema::run(args),
        Command::Eval(args) => cli::eval::run(*args),
        Command::Export(args) => cli::export::run(args),
        Command::Fid(args) => cli::fid::run(*args),
        Command::Import(args) => cli::import::run(args),
        Command::Info(args) => cli::info::run(args),
        Command::Prepare(args) => cli::prepare::run(*args),
        Command::Sample(args) => cli::sample::run(*args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => cli::serve::run(*args),
        Command::Train(args) => return cli::train::run(*args),
        Command::Tune(args) => cli::tune::run(&args),
        Command::Verify(args) => cli::verify::run(args),
    }?;
    Ok(Ended::Done)
}

/// Says what is wrong with the arguments, or what was asked about them: help, version.
fn refuse(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    let odd = |line: &str| say::shortened(&say::escaped(line)) != line;
    if error.use_stderr() && text.lines().any(odd) {
        text.lines().for_each(|line| note!("{line}"));
        return ExitCode::from(error.exit_code() as u8);
    }
    match error.print().and_then(|()| io::stdout().flush()) {
        Err(why) if !error.use_stderr() && why.kind() != io::ErrorKind::BrokenPipe => {
            note!("edm2k: error: the help could not be printed: {why}");
            ExitCode::FAILURE
        }
        _ => ExitCode::from(error.exit_code() as u8),
    }
}
