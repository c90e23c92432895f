//! The board's devices, by port and by PCI slot: all that a guest reaches without memory and processors.

use std::{fmt, fs::File, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{GuestMemory, Hypervisor, Interrupts, MachineConfig, RunControl, acpi, firmware, layout};
use crate::{
    Result,
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
/// The slot and function of power management: beside the bridge to ISA.
const POWER_MANAGEMENT_AT: (u8, u8) = (1, 3);
/// The number of block devices among virtio's.
const DISK: u16 = 2;

/// The devices of one machine.
pub struct Hardware {
    hypervisor: Arc<dyn Hypervisor>,
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    ports: PortBus,
    pci: Arc<PciBus>,
    serial: Arc<SerialPort>,
    control: Arc<RunControl>,
    power_button: Arc<EventFd>,
    next_bar: u32,
    /// By slot.
    devices: Vec<Arc<VirtioPci>>,
    /// PCI slots of disks.
    disks: Vec<u8>,
}

impl fmt::Debug for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hardware").field("ports", &self.ports).finish_non_exhaustive()
    }
}

impl Hardware {
    /// The fixed devices of a machine whose interrupt controllers exist.
    ///
    /// # Errors
    /// When the hypervisor refuses, or the host has no descriptors.
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        memory: Arc<GuestMemory>,
        config: &MachineConfig,
        console: Console,
    ) -> Result<Self> {
        let interrupts = Interrupts::new(Arc::clone(&hypervisor))?;
        let control = Arc::new(RunControl::default());
        let pci = Arc::new(PciBus::default());
        pci.insert(0, 0, host_bridge())?;
        pci.insert(1, 0, isa_bridge())?;
        let serial = SerialPort::new(interrupts.pin(COM1_GSI)?, console);
        let rtc = Rtc::new(config.memory.size_bytes, config.cpus.count);
        let config_ports = ConfigPorts::new(Arc::clone(&pci), Arc::clone(&control));
        let mut ports = PortBus::default();
        ports.claim(CONFIG_PORTS, CONFIG_PORT_COUNT, config_ports)?;
        ports.claim(COM1_PORTS, COM1_PORT_COUNT, serial.device())?;
        ports.claim(RTC_PORTS, RTC_PORT_COUNT, rtc)?;
        ports.claim(SLEEP_CONTROL_PORT, SLEEP_PORT_COUNT, AcpiPorts::new(Arc::clone(&control)))?;
        ports.claim(SYSTEM_CONTROL_PORT, 1, ResetPort::new(Arc::clone(&control)))?;
        let power_button = Arc::new(interrupts.pin(acpi::POWER_BUTTON_GSI)?);
        let next_bar = u32::try_from(layout::PCI_WINDOW_START).expect("below 4 GiB");
        let (devices, disks) = (Vec::new(), Vec::new());
        Ok(Self {
            hypervisor,
            memory,
            interrupts,
            ports,
            pci,
            serial,
            control,
            power_button,
            next_bar,
            devices,
            disks,
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
        let place = TransportSlot {
            vm: Arc::clone(&self.hypervisor),
            interrupts: Arc::clone(&self.interrupts),
            memory: Arc::clone(&self.memory),
            bar_address: self.next_bar,
        };
        let transport = VirtioPci::new(place, device)?;
        self.next_bar += BAR_STEP;
        self.pci.insert(slot, 0, Arc::clone(&transport) as _)?;
        self.devices.push(transport);
        Ok(slot)
    }

    /// Adds what firmware needs, once all devices are in the machine: fw_cfg, power management, and the port to which
    /// it says what it does. A kernel that is booted without firmware would only spend its time on looking at them.
    ///
    /// # Errors
    /// When they are there already.
    pub fn add_firmware_devices(&mut self, config: &MachineConfig, log: Option<&Arc<File>>) -> Result<()> {
        let power_management = PowerManagement::new(Arc::clone(&self.control));
        self.pci.insert(POWER_MANAGEMENT_AT.0, POWER_MANAGEMENT_AT.1, Arc::clone(&power_management) as _)?;
        self.ports.add_movable(power_management);
        let items = firmware::items(config.memory.size_bytes, config.cpus.count, &self.disks)?;
        let fw_cfg = FwCfg::new(items, Arc::clone(&self.memory));
        self.ports.claim(FW_CFG_PORTS, FW_CFG_PORT_COUNT, fw_cfg)?;
        if let Some(log) = log {
            self.ports.claim(DEBUG_PORT, 1, DebugPort::new(Box::new(Arc::clone(log))))?;
        }
        Ok(())
    }

    /// All ports.
    #[must_use]
    pub fn ports(&self) -> &PortBus {
        &self.ports
    }

    /// All ports, for the processors: none are left here.
    pub(super) fn take_ports(&mut self) -> PortBus {
        std::mem::take(&mut self.ports)
    }

    /// The PCI bus.
    #[must_use]
    pub fn pci(&self) -> &Arc<PciBus> {
        &self.pci
    }

    /// What was added, by slot.
    pub(super) fn devices(&self) -> &[Arc<VirtioPci>] {
        &self.devices
    }

    /// The serial port, for who types.
    #[must_use]
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// What devices end the machine by.
    #[must_use]
    pub fn control(&self) -> &Arc<RunControl> {
        &self.control
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Writing to it presses the power button.
    #[must_use]
    pub fn power_button(&self) -> &Arc<EventFd> {
        &self.power_button
    }
}
