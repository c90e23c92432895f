//! Running `img` and the reference tools.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

/// The release the tests compare with; see `tests/run`.
pub const ORACLE_RELEASE: &str = "10.0.";

/// What a finished program left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Its exit code; a signal counts as 128 and its number, as in a shell.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, code, stdout, stderr } = self;
        write!(f, "$ {command}\n(exit {code})\n--- stdout\n{stdout}--- stderr\n{stderr}---")
    }
}

impl Output {
    /// The standard output of a program that must have succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, 0, "{self}");
        self.stdout
    }
}

/// Bounds for a program that is fed hostile input.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Address space, so that an allocation sized by a header fails at once.
    pub memory_bytes: u64,
    /// Wall clock; the program is killed then and its exit code is 124.
    pub seconds: u32,
}

/// A program about to be run in a directory.
#[derive(Debug)]
pub struct Run {
    program: OsString,
    arguments: Vec<OsString>,
    directory: PathBuf,
    bounds: Option<Bounds>,
}

impl Run {
    /// Any program, in `directory`.
    pub fn new(program: impl Into<OsString>, directory: &Path) -> Self {
        Self { program: program.into(), arguments: Vec::new(), directory: directory.to_owned(), bounds: None }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Bounds memory and time.
    #[must_use]
    pub fn within(mut self, bounds: Bounds) -> Self {
        self.bounds = Some(bounds);
        self
    }

    /// Runs it to its end with empty standard input.
    ///
    /// # Panics
    /// When it cannot be started at all.
    #[track_caller]
    #[must_use]
    pub fn output(&self) -> Output {
        let mut command = match self.bounds {
            None => Command::new(&self.program),
            Some(Bounds { memory_bytes, seconds }) => {
                let mut shell = Command::new("sh");
                let script = format!(
                    "ulimit -v {} && ulimit -c 0 && exec timeout -k 2 {seconds} \"$@\"",
                    memory_bytes / 1024
                );
                shell.args(["-c", &script, "sh"]).arg(&self.program);
                shell
            }
        };
        command.args(&self.arguments).current_dir(&self.directory).stdin(Stdio::null());
        // Messages are compared, so they must not be translated.
        command.env("LC_ALL", "C").env_remove("RUST_BACKTRACE");
        let output = match command.output() {
            Ok(output) => output,
            Err(error) => panic!("cannot run {}: {error}", self.program.display()),
        };
        Output {
            command: self.to_string(),
            code: exit_code(output.status),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.program.display())?;
        self.arguments.iter().try_for_each(|argument| write!(f, " {}", argument.display()))
    }
}

fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// `img` with arguments, in `directory`.
#[must_use]
pub fn img<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>) -> Run {
    Run::new(img_binary(), directory).args(arguments)
}

/// A shell line in which `$img` is the program, run in `directory`; any part of a pipe that fails makes it fail.
#[track_caller]
#[must_use]
pub fn shell(directory: &Path, line: &str) -> Output {
    Run::new("bash", directory)
        .args(["-c", &format!("set -o pipefail; img=$1; {line}"), "bash"])
        .arg(img_binary())
        .output()
}

/// The reference `qemu-img` with arguments, in `directory`.
#[must_use]
pub fn qemu_img<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>) -> Run {
    Run::new(oracle("qemu-img"), directory).args(arguments)
}

/// `qemu-io` on one image: `commands` run in order in one process.
#[must_use]
pub fn qemu_io<C: AsRef<str>>(directory: &Path, format: &str, image: &str, commands: &[C]) -> Run {
    let run = Run::new(oracle("qemu-io"), directory).args(["-f", format, "--discard=unmap"]);
    commands.iter().fold(run, |run, command| run.arg("-c").arg(command.as_ref())).arg(image)
}

/// A reference tool by name, once its release has been seen to be the right one.
///
/// # Panics
/// When it is missing or of another release: these tests do not pass without their oracle.
pub fn oracle(tool: &str) -> &OsStr {
    static RELEASE: OnceLock<String> = OnceLock::new();
    let release = RELEASE.get_or_init(|| match Command::new("qemu-img").arg("--version").output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    });
    assert!(
        release.starts_with(&format!("qemu-img version {ORACLE_RELEASE}")),
        "these tests compare with qemu-img {ORACLE_RELEASE}x, found: {release}; `tests/run --tools` installs it"
    );
    OsStr::new(tool)
}

/// The `img` of this build: `$IMG_BINARY`, or the one cargo makes in the profile of the running test.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn img_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| env::var_os("IMG_BINARY").map_or_else(|| build("img-cli", "img"), PathBuf::from))
}

/// The `blk-backend` of this build: `$BLK_BACKEND_BINARY`, or the one cargo makes in the profile of the running test.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn blk_backend_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let build = || build("blk-backend", "blk-backend");
    BINARY.get_or_init(|| env::var_os("BLK_BACKEND_BINARY").map_or_else(build, PathBuf::from))
}

/// The `vmm-runner` of this build: `$VMM_RUNNER_BINARY`, or the one cargo makes in the profile of the running test.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn vmm_runner_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let build = || build("vmm-runner", "vmm-runner");
    BINARY.get_or_init(|| env::var_os("VMM_RUNNER_BINARY").map_or_else(build, PathBuf::from))
}

/// Builds a program next to the running test, `target/PROFILE/deps/TEST`, where `cargo test --workspace` has
/// usually built it already.
fn build(package: &str, program: &str) -> PathBuf {
    let test = env::current_exe().expect("a running program has a path");
    let profile_directory = test.ancestors().nth(2).expect("cargo runs tests from target/PROFILE/deps");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "-p", package, "--bin", program]);
    if profile_directory.ends_with("release") {
        cargo.arg("--release");
    }
    cargo.arg("--target-dir").arg(profile_directory.parent().expect("below target/"));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let output = cargo.output().expect("cargo runs these tests, so it is there");
    assert!(output.status.success(), "cannot build {program}: {}", String::from_utf8_lossy(&output.stderr));
    profile_directory.join(program)
}
