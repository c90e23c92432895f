//! One processor: its thread and what happens at each exit from the guest.

use std::{
    cell::Cell,
    ptr,
    sync::{Arc, Mutex, Once, PoisonError},
    thread::{self, JoinHandle},
};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{
    control::{End, RunControl},
    exits::{ExitCounts, Reason},
    layout,
};
use crate::{Error, Result, bus::PortBus, pci::PciBus};

/// What an exit can reach.
#[derive(Clone, Debug)]
pub(super) struct Board {
    pub(super) ports: Arc<PortBus>,
    pub(super) pci: Arc<PciBus>,
    pub(super) control: Arc<RunControl>,
    pub(super) exits: Arc<ExitCounts>,
    pub(super) is_fenced: bool,
    /// Where KVM keeps writes back: held by the processor that does them. The ring is one for all.
    pub(super) kept_back: Option<Arc<Mutex<()>>>,
}

thread_local! {
    /// The run area of this thread's processor, for the signal handler.
    static RUN_AREA: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// A kick that arrives just before the guest is entered must not be lost: it makes the entry return at once.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN_AREA.get();
    if !run.is_null() {
        // SAFETY: the pointer is set by this thread while its processor's run area is mapped.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Lets threads be kicked; once a process.
fn install_kick() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| {
            Error::host("a signal handler")(std::io::Error::from_raw_os_error(error.errno()))
        });
    });
    result
}

/// Starts the thread of a processor, pinned to `host_cpu` where given.
pub(super) fn start(
    index: u32,
    vcpu: VcpuFd,
    board: Board,
    host_cpu: Option<usize>,
) -> Result<JoinHandle<()>> {
    install_kick()?;
    thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            let control = Arc::clone(&board.control);
            let ended = EndOnPanic(&control);
            if let Err(error) = run(index, vcpu, &board, host_cpu) {
                control.end(End::Failed(error.to_string()));
            }
            std::mem::forget(ended);
        })
        .map_err(Error::host("a thread for a processor"))
}

/// A processor that panics takes the machine with it rather than leave it hanging.
struct EndOnPanic<'a>(&'a RunControl);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        self.0.end(End::Failed("a processor's thread panicked".to_owned()));
    }
}

/// Clears the pointer before the run area goes.
struct RunArea;

impl Drop for RunArea {
    fn drop(&mut self) {
        RUN_AREA.set(ptr::null_mut());
    }
}

fn run(index: u32, mut vcpu: VcpuFd, board: &Board, host_cpu: Option<usize>) -> Result<()> {
    if let Some(cpu) = host_cpu {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        rustix::thread::sched_setaffinity(None, &set).map_err(|error| {
            Error::Invalid(format!(
                "processor {index} cannot be pinned to processor {cpu} of the host: {}",
                std::io::Error::from(error)
            ))
        })?;
    }
    if board.is_fenced {
        // Queues are started by this thread, and are no better off.
        blk_backend::sandbox::restrict_thread().map_err(Error::host("restrict a processor's thread"))?;
    }
    RUN_AREA.set(ptr::from_mut(vcpu.get_kvm_run()));
    board.exits.enter();
    board.control.begins(index, rustix::thread::gettid().as_raw_nonzero().get());
    let _area = RunArea;
    // A guest without that clock refuses to be told, and needs not to be.
    while board.control.may_run(|| _ = vcpu.kvmclock_ctrl().ok()) {
        let result = vcpu.run().map(|_| ());
        match result {
            Ok(()) => catch_up(&mut vcpu, board)?,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                vcpu.set_kvm_immediate_exit(0);
                board.exits.count(Reason::Interrupted);
                continue;
            }
            Err(error) => return Err(Error::kvm("run a processor")(error)),
        }
        let exit = vcpu.get_kvm_run();
        match exit.exit_reason {
            KVM_EXIT_IO => port_access(exit, board),
            KVM_EXIT_MMIO => memory_access(exit, board),
            KVM_EXIT_INTR | KVM_EXIT_HLT => board.exits.count(Reason::Interrupted),
            KVM_EXIT_SYSTEM_EVENT => {
                board.exits.count(Reason::Other);
                // SAFETY: the reason says which member of the union is set.
                let kind = unsafe { exit.__bindgen_anon_1.system_event.type_ };
                board.control.end(match kind {
                    KVM_SYSTEM_EVENT_SHUTDOWN => End::PowerOff,
                    KVM_SYSTEM_EVENT_RESET => End::Reset,
                    KVM_SYSTEM_EVENT_CRASH => End::Failed("it said that it crashed".to_owned()),
                    other => End::Failed(format!(
                        "KVM reports a system event {other} that this runner does not know"
                    )),
                });
            }
            // A triple fault: what a PC does then is reset.
            KVM_EXIT_SHUTDOWN => {
                board.exits.count(Reason::Other);
                let registers = describe(&vcpu);
                return Err(Error::Guest(format!("triple fault on processor {index}\n{registers}")));
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the reason says which member of the union is set.
                let reason = unsafe { exit.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                let registers = describe(&vcpu);
                return Err(Error::Guest(format!(
                    "the hardware refused to enter it on processor {index} (reason {reason:#x})\n{registers}"
                )));
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: the reason says which member of the union is set.
                let suberror = unsafe { exit.__bindgen_anon_1.internal.suberror };
                let registers = describe(&vcpu);
                return Err(Error::Guest(format!(
                    "KVM could not go on with processor {index} ({})\n{registers}",
                    internal_error(suberror)
                )));
            }
            other => {
                let registers = describe(&vcpu);
                return Err(Error::Guest(format!(
                    "exit {other} on processor {index}, which this runner does not know\n{registers}"
                )));
            }
        }
    }
    Ok(())
}

/// Does what the guest wrote and KVM kept back, before what it has left for now.
fn catch_up(vcpu: &mut VcpuFd, board: &Board) -> Result<()> {
    let Some(kept_back) = &board.kept_back else { return Ok(()) };
    // Who waits here finds what this one has done.
    let _one = kept_back.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(write) = vcpu.coalesced_mmio_read().map_err(Error::kvm("read what was kept back"))? {
        let length = (write.len as usize).min(write.data.len());
        if let Ok(port) = u16::try_from(write.phys_addr) {
            board.ports.write(port, &write.data[..length]);
        }
    }
    Ok(())
}

fn internal_error(suberror: u32) -> String {
    match suberror {
        1 => "an instruction that it cannot emulate".to_owned(),
        2 => "two exceptions at once".to_owned(),
        3 => "an exception while one was delivered".to_owned(),
        4 => "an exit that it does not expect".to_owned(),
        other => format!("internal error {other}"),
    }
}

/// A port instruction; `rep` forms come with several accesses at once.
fn port_access(exit: &mut kvm_run, board: &Board) {
    let area: *mut kvm_run = exit;
    // SAFETY: the reason says which member of the union is set.
    let io = unsafe { exit.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let Some(length) = size.checked_mul(io.count as usize) else { return };
    let Ok(offset) = usize::try_from(io.data_offset) else { return };
    // SAFETY: KVM puts `count` items of `size` bytes at `data_offset` of the mapped run area and does not touch them
    // until the processor runs again; nothing else borrows that part of it.
    let data = unsafe { std::slice::from_raw_parts_mut(area.cast::<u8>().add(offset), length) };
    let is_read = u32::from(io.direction) == KVM_EXIT_IO_IN;
    board.exits.count(if is_read { Reason::PortRead } else { Reason::PortWrite });
    for item in data.chunks_exact_mut(size.max(1)) {
        if is_read {
            board.ports.read(io.port, item);
        } else {
            board.ports.write(io.port, item);
        }
    }
}

fn memory_access(exit: &mut kvm_run, board: &Board) {
    // SAFETY: the reason says which member of the union is set.
    let mmio = unsafe { &mut exit.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    let data = &mut mmio.data[..length];
    if mmio.is_write == 0 {
        board.exits.count(Reason::MmioRead);
        board.pci.read_memory(mmio.phys_addr, data);
    } else {
        board.exits.count(Reason::MmioWrite);
        if mmio.phys_addr == layout::INIT_REGISTER {
            board.exits.reach_init();
        }
        board.pci.write_memory(mmio.phys_addr, data);
    }
}

/// The registers, for a guest that cannot go on.
fn describe(vcpu: &VcpuFd) -> String {
    let mut rows = Vec::new();
    if let Ok(regs) = vcpu.get_regs() {
        let named = [
            ("rip", regs.rip),
            ("rflags", regs.rflags),
            ("rsp", regs.rsp),
            ("rbp", regs.rbp),
            ("rax", regs.rax),
            ("rbx", regs.rbx),
            ("rcx", regs.rcx),
            ("rdx", regs.rdx),
            ("rsi", regs.rsi),
            ("rdi", regs.rdi),
            ("r8", regs.r8),
            ("r9", regs.r9),
            ("r10", regs.r10),
            ("r11", regs.r11),
            ("r12", regs.r12),
            ("r13", regs.r13),
            ("r14", regs.r14),
            ("r15", regs.r15),
        ];
        rows.extend(named.chunks(4).map(row));
    }
    if let Ok(sregs) = vcpu.get_sregs() {
        let named = [("cr0", sregs.cr0), ("cr2", sregs.cr2), ("cr3", sregs.cr3), ("cr4", sregs.cr4)];
        rows.push(row(&named));
        let named = [("efer", sregs.efer), ("cs", u64::from(sregs.cs.selector)), ("base", sregs.cs.base)];
        rows.push(row(&named));
    }
    rows.join("\n")
}

fn row(named: &[(&str, u64)]) -> String {
    named.iter().map(|(name, value)| format!("  {name:>6} {value:016x}")).collect()
}
