//! `--limits` and `--allow-refs`, on every command: what a run may take, and where images may lead.
//!
//! Memory and CPU time are kept by the system (`RLIMIT_DATA`, `RLIMIT_CPU`), so that nothing in here can forget to
//! count; the rest is kept by the library. A run that meets a limit of the system ends at once, with a message, exit
//! code 1, and without the files that it was making.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::Write as _,
    panic,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use clap::ValueHint;
use img_core::{limits, text};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::{consts::SIGXCPU, iterator::Signals};

use crate::{
    context::Context,
    created,
    error::{Failure, os_text},
    size,
};

// What stands here as documentation would be taken for what the command does.
#[derive(Debug, clap::Args)]
pub(crate) struct LimitArgs {
    /// Bounds of this run, with commas between: memory=BYTES, cpu=SECONDS, depth=LAYERS of a chain, output=BYTES
    /// written, unwrapped=BYTES out of compressed sources
    #[arg(long, value_name = "LIMITS", help_heading = "Limits")]
    limits: Vec<String>,

    /// Refuse backing files, data files and extents that are not in this directory or below it
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Limits")]
    allow_refs: Option<String>,
}

/// A run needs this much to say anything at all.
const LEAST_MEMORY_BYTES: u64 = 4 << 20;

/// Seconds between the signal that ends a run and the one that nothing can hold back.
const CPU_GRACE_SECONDS: u64 = 2;

static MEMORY_MESSAGE: OnceLock<String> = OnceLock::new();
static UNWRAPPED_BYTES: OnceLock<u64> = OnceLock::new();

impl LimitArgs {
    /// Sets the limits of this process.
    ///
    /// # Errors
    /// For limits that do not exist, and where the system refuses.
    pub(crate) fn apply(&self, context: &Context) -> Result<(), Failure> {
        let mut own = limits::Limits {
            references_in: self.allow_refs.as_deref().map(text::to_path),
            ..Default::default()
        };
        let (mut memory, mut cpu) = (None, None);
        for part in self.limits.iter().flat_map(|list| list.split(',')) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let bytes = |least| {
                let read = size::argument(&format!("limit '{name}'"), value, size::MAX_BYTES)
                    .map_err(Failure::new)?;
                if read < least {
                    return Err(Failure::new(format!("The limit '{name}' is at least {least}, not {read}")));
                }
                Ok(read)
            };
            let count = |most| size::count(&format!("limit '{name}'"), value, 1, most).map_err(Failure::new);
            match name {
                "memory" => memory = Some(bytes(LEAST_MEMORY_BYTES)?),
                "cpu" => cpu = Some(count(u64::from(u32::MAX))?),
                "depth" => own.chain_depth = Some(usize::try_from(count(1 << 20)?).expect("at most 2^20")),
                "output" => own.output_bytes = Some(bytes(0)?),
                "unwrapped" => drop(UNWRAPPED_BYTES.set(bytes(1)?)),
                _ => {
                    return Err(Failure::usage(format!(
                        "--limits expects memory, cpu, depth, output or unwrapped, not '{name}'"
                    )));
                }
            }
        }
        limits::set(own)?;
        if let Some(seconds) = cpu {
            bound_cpu(seconds, context.name())?;
        }
        memory.map_or(Ok(()), |bytes| bound_memory(bytes, context.name()))
    }
}

/// What may come out of a compressed source, if that was said.
pub(crate) fn unwrapped_bytes() -> Option<u64> {
    UNWRAPPED_BYTES.get().copied()
}

fn bound(resource: Resource, soft: u64, hard: u64) -> Result<(), Failure> {
    let there = getrlimit(resource).maximum.unwrap_or(u64::MAX);
    setrlimit(resource, Rlimit { current: Some(soft.min(there)), maximum: Some(hard.min(there)) })
        .map_err(|error| Failure::new(format!("cannot set a limit: {}", os_text(&error.into()))))
}

fn bound_cpu(seconds: u64, name: &str) -> Result<(), Failure> {
    let message = format!("{name}: the limit of {seconds} s of CPU time is reached");
    let mut signals = Signals::new([SIGXCPU])
        .map_err(|error| Failure::new(format!("Cannot handle signals: {}", os_text(&error))))?;
    thread::Builder::new()
        .name("cpu limit".to_owned())
        .spawn(move || {
            if signals.forever().next().is_some() {
                stop(&message);
            }
        })
        .map_err(|error| Failure::new(format!("Cannot start a thread: {}", os_text(&error))))?;
    bound(Resource::Cpu, seconds, seconds + CPU_GRACE_SECONDS)
}

fn bound_memory(bytes: u64, name: &str) -> Result<(), Failure> {
    let message = format!("{name}: the limit of {bytes} bytes of memory is reached");
    let kept = MEMORY_MESSAGE.get_or_init(|| message);
    // Threads that find no room for their stack make who starts them panic.
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let said = info.payload().downcast_ref::<String>();
        if said.is_some_and(|said| said.starts_with("failed to spawn thread")) {
            stop(kept);
        }
        before(info);
    }));
    bound(Resource::Data, bytes, bytes)
}

/// Ends the process: nothing that it was making is left. Takes no memory.
fn stop(message: &str) -> ! {
    static STOPS: AtomicBool = AtomicBool::new(false);
    if STOPS.swap(true, Ordering::SeqCst) {
        loop {
            thread::park();
        }
    }
    // There is nobody left to be told that telling failed.
    let mut err = std::io::stderr();
    err.write_all(message.as_bytes()).and_then(|()| err.write_all(b"\n")).ok();
    created::remove_all();
    std::process::exit(1)
}

/// The system's allocator, which ends the process where a limit of memory leaves nothing to give.
pub(crate) struct Bounded;

impl Bounded {
    fn given(place: *mut u8) -> *mut u8 {
        if place.is_null()
            && let Some(message) = MEMORY_MESSAGE.get()
        {
            stop(message);
        }
        place
    }
}

// SAFETY: every call is the system allocator's own, with the caller's arguments and under the caller's promises; what
// it returns is returned unchanged.
#[expect(unsafe_code, reason = "an allocator is unsafe by its trait")]
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of the trait.
        Self::given(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of the trait.
        Self::given(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those of the trait; the place came from the same allocator.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are those of the trait; the place came from the same allocator.
        Self::given(unsafe { System.realloc(place, layout, new_size) })
    }
}
