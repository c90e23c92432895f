//! `img-bench`: pairs `img` with the installed qemu-img on the same inputs and prints ratios.
//!
//! Each row runs both tools by turns, with the inputs in the page cache and earlier output written back
//! first, and reports the least of its runs. A row whose output does not read like its input is an error, not a
//! figure.

mod bare;
mod inputs;
mod measure;
mod rows;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use clap::Parser;

use img_bench::{by_turns, print};
use inputs::Inputs;
use measure::Cost;
use rows::Row;

/// Compare the speed of img with that of qemu-img.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where inputs are made and outputs go; wants 50 GiB of apparent, 20 GiB of real space.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// Small inputs, for a quick look; figures in documents are made without it.
    #[arg(long)]
    quick: bool,
    /// Measured runs of each tool in each row; the least counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only rows whose name contains this; may be given several times.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Make the inputs and stop.
    #[arg(long)]
    inputs_only: bool,
    /// The program to measure.
    #[arg(long, default_value = "target/release/img")]
    img: PathBuf,
    /// The program it is compared with.
    #[arg(long, default_value = "/usr/bin/qemu-img")]
    reference: PathBuf,
    /// Only read these files: how the program calls itself to measure what their bytes cost alone.
    #[arg(long, value_name = "FILE", num_args = 1.., hide = true)]
    bare: Vec<PathBuf>,
    /// Write what was read, too.
    #[arg(long, value_name = "FILE", requires = "bare", hide = true)]
    to: Option<PathBuf>,
}

fn main() -> ExitCode {
    img_bench::program(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    if !arguments.bare.is_empty() {
        return bare::run(&arguments.bare, arguments.to.as_deref());
    }
    let scale = if arguments.quick { inputs::QUICK } else { inputs::FULL };
    let inputs = Inputs::new(&arguments.dir, scale, &arguments.reference)?;
    let only = &arguments.only;
    let is_asked_for = |row: &&Row| only.is_empty() || only.iter().any(|text| row.name.contains(text));
    let rows = || rows::all().filter(is_asked_for);
    for name in rows().flat_map(|row| row.needs) {
        inputs.need(name)?;
    }
    if arguments.inputs_only {
        return Ok(());
    }
    let tools = [fs::canonicalize(&arguments.img)?, fs::canonicalize(&arguments.reference)?];
    print(concat!(
        "| operation | CPU s, img | qemu-img | bare | ratio (target) | wall s, img | qemu-img | ratio (target) ",
        "| peak MiB, img | qemu-img |",
    ));
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for row in rows() {
        let mut costs = [Vec::new(), Vec::new()];
        let mut bare_costs = Vec::new();
        for run in 0..arguments.runs {
            for tool in by_turns(run, 0, 1) {
                let measure = || run_all(row, &inputs, &tools[tool]);
                costs[tool].push(measure_row(row, &inputs, &tools[1], measure)?);
            }
            if let Some(bare) = &row.bare {
                let measure = || measure::run(&mut bare.command(&inputs)?);
                bare_costs.push(measure_row(&Row { proof: None, ..*row }, &inputs, &tools[1], measure)?);
            }
        }
        let bare_cost = row.bare.is_some().then(|| measure::least(&bare_costs));
        print(&line(row, measure::least(&costs[0]), measure::least(&costs[1]), bare_cost));
    }
    Ok(())
}

/// One run of `row`, of which that of `measured` counts.
fn measure_row(
    row: &Row,
    inputs: &Inputs,
    reference: &Path,
    measured: impl FnOnce() -> io::Result<Cost>,
) -> io::Result<Cost> {
    let output = inputs.path("output");
    match fs::remove_file(&output) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for (from, to) in row.copies {
        copy_sparse(&inputs.path(from), &inputs.path(&inputs.word(to)))?;
    }
    for words in row.before {
        measure::run(&mut command(reference, words, inputs))?;
    }
    settle(row, inputs)?;
    for name in row.needs {
        bare::run(&[inputs.path(name)], None)?;
    }
    let cost = measured()?;
    if let Some(words) = row.proof {
        measure::run(&mut command(reference, words, inputs))?;
    }
    Ok(cost)
}

/// Writes back what the row works on and what was made or deleted before, as it would be charged to whoever comes next.
fn settle(row: &Row, inputs: &Inputs) -> io::Result<()> {
    for (_, to) in row.copies {
        fs::File::open(inputs.path(&inputs.word(to)))?.sync_all()?;
    }
    if !row.before.is_empty() {
        fs::File::open(inputs.path("output"))?.sync_all()?;
    }
    fs::File::open(&inputs.dir)?.sync_all()
}

/// What the commands of `row` cost with `tool`.
fn run_all(row: &Row, inputs: &Inputs, tool: &Path) -> io::Result<Cost> {
    let mut cost = Cost::default();
    for _ in 0..row.times {
        for words in row.commands {
            cost = cost.then(measure::run(&mut command(tool, words, inputs))?);
        }
    }
    Ok(cost)
}

fn command(tool: &Path, words: &str, inputs: &Inputs) -> Command {
    let mut command = Command::new(tool);
    command.current_dir(&inputs.dir);
    command.args(words.split(' ').map(|word| inputs.word(word)));
    command
}

/// `cp --sparse=always`, which keeps holes as holes.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let status = Command::new("cp").arg("--sparse=always").arg(from).arg(to).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("cp {}: {status}", from.display()))) }
}

fn line(row: &Row, ours: Cost, reference: Cost, bare: Option<Cost>) -> String {
    let (cpu, wall) = (
        ours.cpu.as_secs_f64() / reference.cpu.as_secs_f64(),
        ours.wall.as_secs_f64() / reference.wall.as_secs_f64(),
    );
    let mark = |ratio: f64, target: f64| {
        let reached = if ratio <= target { "" } else { " ✗" };
        format!("{ratio:.2} ({target}){reached}")
    };
    format!(
        "| {} | {:.3} | {:.3} | {} | {} | {:.3} | {:.3} | {} | {} | {} |",
        row.name,
        ours.cpu.as_secs_f64(),
        reference.cpu.as_secs_f64(),
        bare.map_or("—".to_owned(), |bare| format!("{:.3}", bare.cpu.as_secs_f64())),
        mark(cpu, row.target.0),
        ours.wall.as_secs_f64(),
        reference.wall.as_secs_f64(),
        mark(wall, row.target.1),
        ours.peak_kib.div_ceil(1024),
        reference.peak_kib.div_ceil(1024),
    )
}
