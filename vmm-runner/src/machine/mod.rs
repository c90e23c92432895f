//! The machine: memory, processors, interrupts, and one board, "a small PC".

mod acpi;
mod control;
mod cpuid;
mod firmware;
mod handle;
mod hypervisor;
mod interrupts;
pub mod layout;
mod memory;
mod registers;
mod vcpu;

use std::{fs::File, sync::Arc};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

pub use acpi::{AcpiHardware, AcpiTables, MAX_CPUS, RESET_PORT, RESET_VALUE, tables as acpi_tables};
pub use control::{End, RunControl};
pub use firmware::Firmware;
pub use handle::MachineHandle;
pub use hypervisor::Hypervisor;
pub(crate) use interrupts::new_eventfd;
pub use interrupts::{Interrupts, Message, MessageInterrupt};
pub use layout::{HIGH_RAM_START, LOW_RAM_LIMIT};
pub use memory::{GuestMemory, MemoryConfig, allocate as allocate_memory, ram_ranges, shared_fd};
pub use registers::Entry;
pub use vcpu::ExitCounts;

use crate::{
    Error, Result,
    boot::Boot,
    bus::PortBus,
    devices::{
        AcpiPorts, COM1_GSI, COM1_PORT_COUNT, COM1_PORTS, Console, DEBUG_PORT, DebugPort, FW_CFG_PORT_COUNT,
        FW_CFG_PORTS, FwCfg, PowerManagement, RTC_PORT_COUNT, RTC_PORTS, ResetPort, Rtc, SLEEP_CONTROL_PORT,
        SLEEP_PORT_COUNT, SYSTEM_CONTROL_PORT, SerialPort,
    },
    pci::{CONFIG_PORT_COUNT, CONFIG_PORTS, ConfigPorts, PciBus, host_bridge, isa_bridge},
    virtio::{TransportSlot, VirtioDevice, VirtioPci},
};

/// Each device's BAR starts in a piece of this size of the PCI window.
const BAR_STEP: u32 = 0x1_0000;

/// The number of block devices among virtio's.
const DISK: u16 = 2;

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
}

/// A machine that is put together and does not run yet, or that runs.
pub struct Machine {
    config: MachineConfig,
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    ports: PortBus,
    pci: Arc<PciBus>,
    serial: Arc<SerialPort>,
    control: Arc<RunControl>,
    exits: Arc<ExitCounts>,
    next_bar: u32,
    power_button: Arc<EventFd>,
    /// PCI slots of disks.
    disks: Vec<u8>,
    /// What firmware is mapped from.
    firmware: Option<MmapRegion>,
    /// By slot.
    devices: Vec<Arc<VirtioPci>>,
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
        let interrupts = Interrupts::new(Arc::clone(&vm) as _)?;
        let control = Arc::new(RunControl::default());
        let pci = Arc::new(PciBus::default());
        pci.insert(0, 0, host_bridge())?;
        pci.insert(1, 0, isa_bridge())?;
        let power_management = PowerManagement::new(Arc::clone(&control));
        pci.insert(1, 3, Arc::clone(&power_management) as _)?;
        let serial = SerialPort::new(interrupts.pin(COM1_GSI)?, console);
        let mut ports = PortBus::default();
        ports.claim(
            CONFIG_PORTS,
            CONFIG_PORT_COUNT,
            ConfigPorts::new(Arc::clone(&pci), Arc::clone(&control)),
        )?;
        ports.claim(COM1_PORTS, COM1_PORT_COUNT, serial.device())?;
        ports.claim(RTC_PORTS, RTC_PORT_COUNT, Rtc::new(config.memory.size_bytes, config.cpus.count))?;
        ports.claim(SLEEP_CONTROL_PORT, SLEEP_PORT_COUNT, AcpiPorts::new(Arc::clone(&control)))?;
        ports.add_movable(power_management);
        ports.claim(SYSTEM_CONTROL_PORT, 1, ResetPort::new(Arc::clone(&control)))?;
        let power_button = Arc::new(interrupts.pin(acpi::POWER_BUTTON_GSI)?);
        let next_bar = u32::try_from(layout::PCI_WINDOW_START).expect("below 4 GiB");
        Ok(Self {
            config,
            kvm,
            vm,
            memory,
            interrupts,
            ports,
            pci,
            serial,
            control,
            exits: Arc::default(),
            next_bar,
            power_button,
            disks: Vec::new(),
            firmware: None,
            devices: Vec::new(),
        })
    }

    /// Puts a device into the next PCI slot and returns the slot.
    ///
    /// # Errors
    /// When no slot, interrupt or descriptor is left.
    pub fn add_device(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8> {
        let slot = self.pci.free_slot()?;
        if device.device_type() == DISK {
            self.disks.push(slot);
        }
        let transport = VirtioPci::new(
            TransportSlot {
                vm: Arc::clone(&self.vm) as _,
                interrupts: Arc::clone(&self.interrupts),
                memory: Arc::clone(&self.memory),
                bar_address: self.next_bar,
            },
            device,
        )?;
        self.next_bar += BAR_STEP;
        self.pci.insert(slot, 0, Arc::<VirtioPci>::clone(&transport))?;
        self.devices.push(transport);
        Ok(slot)
    }

    /// What other threads hold the machine by, once all devices are in it.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        MachineHandle::new(self)
    }

    /// The serial port, for who types.
    #[must_use]
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// What holds and ends the machine.
    #[must_use]
    pub fn control(&self) -> &Arc<RunControl> {
        &self.control
    }

    /// Exits so far.
    #[must_use]
    pub fn exits(&self) -> &Arc<ExitCounts> {
        &self.exits
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Loads what the boot starts from and lets the processors run until the machine ends.
    ///
    /// # Errors
    /// When the kernel or the firmware cannot be loaded, or KVM refuses.
    pub fn run(mut self, boot: &Boot) -> Result<End> {
        let entry = match boot {
            Boot::Direct(boot) => {
                let cpus = self.config.cpus.count;
                let acpi =
                    acpi_tables(layout::ACPI_TABLES.0, layout::ACPI_TABLES_END, cpus, AcpiHardware::Reduced)?;
                boot.load(&self.memory, self.config.memory.size_bytes, &acpi)?
            }
            Boot::Firmware { firmware, log } => {
                self.plug_firmware(firmware, log.as_ref())?;
                Entry::Firmware
            }
        };
        self.run_from(entry)
    }

    /// Puts firmware into memory, and what it asks into ports.
    fn plug_firmware(&mut self, firmware: &Firmware, log: Option<&Arc<File>>) -> Result<()> {
        let region = firmware.map(&self.vm, &self.memory)?;
        self.firmware = Some(region);
        let items = firmware::items(self.config.memory.size_bytes, self.config.cpus.count, &self.disks)?;
        let fw_cfg = FwCfg::new(items, Arc::clone(&self.memory));
        self.ports.claim(FW_CFG_PORTS, FW_CFG_PORT_COUNT, fw_cfg)?;
        if let Some(log) = log {
            self.ports.claim(DEBUG_PORT, 1, DebugPort::new(Box::new(Arc::clone(log))))?;
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
        let board = vcpu::Board {
            ports: Arc::new(std::mem::take(&mut self.ports)),
            pci: Arc::clone(&self.pci),
            control: Arc::clone(&self.control),
            exits: Arc::clone(&self.exits),
        };
        let mut processors = Vec::new();
        for cpu in 0..cpus {
            let vcpu = self.vm.create_vcpu(u64::from(cpu)).map_err(Error::kvm("create a processor"))?;
            vcpu.set_cpuid2(&cpuid::for_cpu(&self.kvm, &supported, cpu, cpus)?)
                .map_err(Error::kvm("set CPUID"))?;
            registers::set_msrs(&vcpu)?;
            // The others wait for the first one to start them.
            if cpu == 0 {
                registers::set_up(&vcpu, &self.memory, entry)?;
            }
            processors.push((cpu, vcpu));
        }
        self.control.expect_processors(processors.len());
        let affinity = &self.config.cpus.affinity;
        let mut threads = Vec::new();
        for (cpu, vcpu) in processors {
            let host = affinity.get(cpu as usize % affinity.len().max(1)).map(|&host| vec![host]);
            match vcpu::start(cpu, vcpu, board.clone(), host) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    self.control.end(End::Quit);
                    self.control.adopt(threads);
                    self.control.join();
                    return Err(error);
                }
            }
        }
        self.control.adopt(threads);
        let end = self.control.wait();
        self.control.join();
        Ok(end)
    }
}
