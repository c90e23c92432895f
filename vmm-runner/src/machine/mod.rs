//! The machine: memory, processors, interrupts, and one board, "a small PC".

mod acpi;
mod control;
mod cpuid;
mod exits;
mod firmware;
mod handle;
mod hardware;
mod hypervisor;
mod interrupts;
pub mod layout;
mod memory;
mod registers;
mod vcpu;

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::MmapRegion;

pub use acpi::{AcpiHardware, AcpiTables, MAX_CPUS, tables as acpi_tables};
pub use control::{End, RunControl};
pub use exits::{ExitCounts, InitReached};
pub use firmware::Firmware;
pub use handle::MachineHandle;
pub use hardware::Hardware;
pub use hypervisor::Hypervisor;
pub(crate) use interrupts::new_eventfd;
pub use interrupts::{Interrupts, Message, MessageInterrupt};
pub use layout::{HIGH_RAM_START, LOW_RAM_LIMIT};
pub use memory::{GuestMemory, MemoryConfig, allocate as allocate_memory, ram_ranges, shared_fd};
pub use registers::Entry;

use crate::{
    Error, Result,
    boot::Boot,
    devices::{Console, SerialPort},
    pci::CONFIG_PORTS,
    virtio::VirtioDevice,
};

/// What KVM must have for this machine.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
    (Cap::IrqRouting, "interrupt routing"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::UserMemory, "user memory"),
];

/// How many processors, and where they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// How many.
    pub count: u32,
    /// Host processors that each may run on, in turn; empty for any.
    pub affinity: Vec<usize>,
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { count: 1, affinity: Vec::new() }
    }
}

impl std::str::FromStr for CpuConfig {
    type Err = String;

    /// `4`, or `4,affinity=0-1:3`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (count, rest) = text.split_once(',').map_or((text, None), |(count, rest)| (count, Some(rest)));
        let count = count.parse().ok().filter(|count| (1..=MAX_CPUS).contains(count));
        let count = count.ok_or_else(|| format!("the number of processors is from 1 to {MAX_CPUS}"))?;
        let mut affinity = Vec::new();
        if let Some(rest) = rest {
            let list =
                rest.strip_prefix("affinity=").ok_or_else(|| format!("cpus have no option '{rest}'"))?;
            for part in list.split(':') {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                let bound = |text: &str| {
                    text.parse().ok().filter(|cpu: &usize| *cpu < rustix::thread::CpuSet::MAX_CPU)
                };
                match (bound(first), bound(last)) {
                    (Some(first), Some(last)) if first <= last => affinity.extend(first..=last),
                    _ => return Err(format!("'{part}' is not a range of host processors (0-3)")),
                }
            }
        }
        Ok(Self { count, affinity })
    }
}

/// What the machine is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MachineConfig {
    /// Processors.
    pub cpus: CpuConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// The process has entered its sandbox, and the threads of processors and queues give up more.
    pub is_fenced: bool,
}

/// A machine that is put together and does not run yet, or that runs.
pub struct Machine {
    config: MachineConfig,
    kvm: Kvm,
    vm: Arc<VmFd>,
    hardware: Hardware,
    exits: Arc<ExitCounts>,
    /// KVM keeps writes back that nothing follows from until a later access.
    keeps_back: bool,
    /// What firmware is mapped from.
    firmware: Option<MmapRegion>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Machine {
    /// The board with its fixed devices.
    ///
    /// # Errors
    /// When KVM is missing or too old, or the host has no memory.
    pub fn new(config: MachineConfig, console: Console) -> Result<Self> {
        let kvm =
            Kvm::new().map_err(|errno| Error::OpenKvm(std::io::Error::from_raw_os_error(errno.errno())))?;
        if let Some((_, what)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Error::Invalid(format!("the KVM of this host has no {what}")));
        }
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("create a virtual machine"))?);
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Error::kvm("place the identity map"))?;
        vm.set_tss_address(layout::KVM_TSS).map_err(Error::kvm("place the task state"))?;
        vm.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(Error::kvm("create the timer"))?;
        let memory = Arc::new(memory::allocate(&config.memory)?);
        memory::map_into(&vm, &memory, config.memory.size_bytes)?;
        let hardware = Hardware::new(Arc::clone(&vm) as _, memory, &config, console)?;
        Ok(Self { config, kvm, vm, hardware, exits: Arc::default(), keeps_back: false, firmware: None })
    }

    /// Puts a device into the next PCI slot and returns the slot.
    ///
    /// # Errors
    /// When no slot, interrupt or descriptor is left.
    pub fn add_device(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8> {
        self.hardware.add_device(device)
    }

    /// What other threads hold the machine by, once all devices are in it.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        MachineHandle::new(self)
    }

    /// The serial port, for who types.
    #[must_use]
    pub fn serial(&self) -> &Arc<SerialPort> {
        self.hardware.serial()
    }

    /// What holds and ends the machine.
    #[must_use]
    pub fn control(&self) -> &Arc<RunControl> {
        self.hardware.control()
    }

    /// Exits so far.
    #[must_use]
    pub fn exits(&self) -> &Arc<ExitCounts> {
        &self.exits
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.hardware.memory()
    }

    /// Loads what the boot starts from and lets the processors run until the machine ends.
    ///
    /// # Errors
    /// When the kernel or the firmware cannot be loaded, or KVM refuses.
    pub fn run(mut self, boot: &Boot) -> Result<End> {
        let entry = match boot {
            Boot::Direct(boot) => {
                self.keep_addresses_back()?;
                let cpus = self.config.cpus.count;
                let acpi =
                    acpi_tables(layout::ACPI_TABLES.0, layout::ACPI_TABLES_END, cpus, AcpiHardware::Reduced)?;
                boot.load(self.memory(), self.config.memory.size_bytes, &acpi)?
            }
            Boot::Firmware { firmware, log } => {
                self.firmware = Some(firmware.map(&self.vm, self.hardware.memory())?);
                self.hardware.add_firmware_devices(&self.config, log.as_ref())?;
                Entry::Firmware
            }
        };
        self.run_from(entry)
    }

    /// Lets KVM keep back what is written to the address port of PCI configuration until the access to a data port that
    /// follows, which saves half of the exits of looking for devices.
    fn keep_addresses_back(&mut self) -> Result<()> {
        if self.kvm.check_extension(Cap::CoalescedPio) {
            self.vm
                .register_coalesced_mmio(IoEventAddress::Pio(CONFIG_PORTS.into()), 4)
                .map_err(Error::kvm("keep writes back"))?;
            self.keeps_back = true;
        }
        Ok(())
    }

    /// Lets the processors run from `entry`, whose code is in memory, until the machine ends.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn run_from(mut self, entry: Entry) -> Result<End> {
        let cpus = self.config.cpus.count;
        let supported = cpuid::supported(&self.kvm)?;
        let control = Arc::clone(self.control());
        let board = vcpu::Board {
            ports: Arc::new(self.hardware.take_ports()),
            pci: Arc::clone(self.hardware.pci()),
            control: Arc::clone(&control),
            exits: Arc::clone(self.exits()),
            is_fenced: self.config.is_fenced,
            kept_back: self.keeps_back.then(Arc::default),
        };
        let mut processors = Vec::new();
        for cpu in 0..cpus {
            let mut vcpu = self.vm.create_vcpu(u64::from(cpu)).map_err(Error::kvm("create a processor"))?;
            vcpu.set_cpuid2(&cpuid::for_cpu(&self.kvm, &supported, cpu, cpus)?)
                .map_err(Error::kvm("set CPUID"))?;
            registers::set_msrs(&vcpu)?;
            if self.keeps_back {
                vcpu.map_coalesced_mmio_ring().map_err(Error::kvm("map what is kept back"))?;
            }
            // The others wait for the first one to start them.
            if cpu == 0 {
                registers::set_up(&vcpu, self.memory(), entry)?;
            }
            processors.push((cpu, vcpu));
        }
        control.expect_processors(processors.len());
        let affinity = &self.config.cpus.affinity;
        let mut threads = Vec::new();
        for (cpu, vcpu) in processors {
            let host = affinity.get(cpu as usize % affinity.len().max(1)).copied();
            match vcpu::start(cpu, vcpu, board.clone(), host) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    control.end(End::Quit);
                    control.adopt(threads);
                    control.join();
                    return Err(error);
                }
            }
        }
        control.adopt(threads);
        let end = control.wait();
        control.join();
        Ok(end)
    }
}
