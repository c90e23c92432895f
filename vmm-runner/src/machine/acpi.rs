//! What the guest's ACPI says of this board. For a direct boot it is hardware-reduced (ACPI 6.4, section 4.1), and a
//! guest touches nothing of a PC's power management, timer and old interrupt controllers. Behind firmware, which uses
//! those, they must be told of: a hardware-reduced guest would not stop the timer's interrupts.

use std::ops::Range;

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Method, Name, Notify, ONE,
        Package, Path, ResourceTemplate, Scope, ZERO,
    },
    fadt::{FADTBuilder, Flags},
    gas::{self, AccessSize, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use zerocopy::IntoBytes;

use super::layout;
use crate::{
    Error, Result,
    devices::{
        COM1_GSI, COM1_PORTS, FAST_RESET, PM1_CONTROL, POWER_PORTS, SLEEP_CONTROL_PORT, SLEEP_TYPE_OFF,
        SYSTEM_CONTROL_PORT, TIMER,
    },
    pci::CONFIG_PORTS,
};

const OEM: [u8; 6] = *b"IMGVMM";
const TABLE: [u8; 8] = *b"SMALLPC ";
const REVISION: u32 = 1;

/// The pin that the power button pulses.
pub(super) const POWER_BUTTON_GSI: u32 = 9;
/// The pin of ACPI's own interrupt, which never comes: nothing happens in the event registers.
const SCI_GSI: u16 = 10;
/// Interrupt source override: how the pin of an ISA interrupt is triggered.
const ISA_OVERRIDE: u8 = 2;
const EDGE_HIGH: u8 = 0b0101;
const LEVEL_HIGH: u8 = 0b1101;
/// MADT: the byte of flags that says that there are two 8259 controllers as well (section 5.2.12).
const MADT_FLAGS_AT: usize = 40;
const OLD_CONTROLLERS: u8 = 1;
/// FADT: a state that takes longer to leave than this is not there.
const NO_DEEP_SLEEP: u16 = 0xFFF;
const FACS_BYTES: u32 = 64;
const FACS_VERSION_AT: usize = 32;
/// Local APIC NMI structure.
const LOCAL_NMI: u8 = 4;
/// FADT, IA-PC boot architecture flags (ACPI 6.4, section 5.2.9.3).
const ISA_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;
const NO_CLOCK: u16 = 1 << 5;
/// The largest id of a processor that the tables can name.
pub const MAX_CPUS: u32 = 254;

/// Tables, ready to be put at their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the first byte belongs; the RSDP is there.
    pub address: u64,
    /// All of them.
    pub bytes: Vec<u8>,
}

/// Tables of which firmware decides where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Linked {
    /// The root pointer, whose address of the XSDT is that inside [`Self::tables`].
    pub(super) rsdp: Vec<u8>,
    /// All others. Addresses in them are those inside.
    pub(super) tables: Vec<u8>,
    /// Where in them an address of eight bytes stands.
    pub(super) pointers: Vec<usize>,
    /// Where each of them begins and ends that has a checksum, which is the byte at [`CHECKSUM_AT`].
    pub(super) ranges: Vec<Range<usize>>,
}

/// The checksum of a table ("System Description Table Header").
pub(super) const CHECKSUM_AT: usize = 9;
/// The RSDP's checksum of its first [`RSDP_V1_BYTES`], the address of the XSDT, and the checksum of all.
pub(super) const RSDP_CHECKSUM_AT: usize = 8;
/// See [`RSDP_CHECKSUM_AT`].
pub(super) const RSDP_XSDT_AT: usize = 24;
/// See [`RSDP_CHECKSUM_AT`].
pub(super) const RSDP_EXTENDED_CHECKSUM_AT: usize = 32;
/// What the RSDP was before it had an XSDT.
pub(super) const RSDP_V1_BYTES: usize = 20;
/// The FADT's addresses of the FACS and of the DSDT.
const FADT_FACS_AT: usize = 132;
const FADT_DSDT_AT: usize = 140;
/// The XSDT's addresses follow its header.
const XSDT_ENTRIES_AT: usize = 36;
/// Tables begin at multiples of this.
const ALIGNMENT: usize = 16;

/// Which of the board's hardware the tables tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiHardware {
    /// What a direct boot needs.
    Reduced,
    /// What firmware has used.
    Full,
}

/// Makes the tables of a board with that many processors, for `address` on.
///
/// # Errors
/// When they do not fit before `limit`.
pub fn tables(address: u64, limit: u64, cpus: u32, hardware: AcpiHardware) -> Result<AcpiTables> {
    let rsdp_bytes = Rsdp::len().next_multiple_of(ALIGNMENT);
    let Linked { mut rsdp, tables, .. } = linked(address + rsdp_bytes as u64, cpus, hardware)?;
    rsdp.resize(rsdp_bytes, 0);
    let bytes = [rsdp, tables].concat();
    if address + bytes.len() as u64 > limit {
        return Err(Error::Invalid(format!("the ACPI tables of {cpus} processors do not fit")));
    }
    Ok(AcpiTables { address, bytes })
}

/// Makes the tables, all but the RSDP for `address` on.
pub(super) fn linked(address: u64, cpus: u32, hardware: AcpiHardware) -> Result<Linked> {
    let mut tables = Vec::new();
    let mut ranges = Vec::new();
    let mut place = |table: &[u8]| {
        let start = tables.len();
        tables.extend(table);
        ranges.push(start..tables.len());
        tables.resize(tables.len().next_multiple_of(ALIGNMENT), 0);
        (start, address + start as u64)
    };
    // The one that needs the largest alignment comes first, where the firmware's is kept.
    let facs = (hardware == AcpiHardware::Full).then(|| place(&facs()).1);
    let (_, dsdt) = place(&dsdt());
    let (fadt_at, fadt) = place(&fadt(dsdt, facs));
    let (_, madt) = place(&madt(cpus, hardware)?);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    let entries = [fadt, madt];
    entries.iter().for_each(|&entry| xsdt.add_entry(entry));
    let (xsdt_at, xsdt) = place(&to_bytes(&xsdt));
    let rsdp = to_bytes(&Rsdp::new(OEM, xsdt));
    let mut pointers = vec![fadt_at + FADT_DSDT_AT];
    if facs.is_some() {
        pointers.push(fadt_at + FADT_FACS_AT);
        ranges.remove(0); // it has no checksum
    }
    pointers.extend((0..entries.len()).map(|index| xsdt_at + XSDT_ENTRIES_AT + index * 8));
    Ok(Linked { rsdp, tables, pointers, ranges })
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The firmware ACPI control structure (section 5.2.10): a lock, and a vector to wake up by, which nothing here uses.
fn facs() -> Vec<u8> {
    let mut facs = b"FACS".to_vec();
    facs.extend(FACS_BYTES.to_le_bytes());
    facs.resize(FACS_BYTES as usize, 0);
    facs[FACS_VERSION_AT] = 2;
    facs
}

/// With a FACS for a board with its full hardware.
fn fadt(dsdt: u64, facs: Option<u64>) -> Vec<u8> {
    let port = |address: u16| {
        GAS::new(gas::AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(SYSTEM_CONTROL_PORT);
    fadt.reset_value = FAST_RESET;
    // There are ISA devices, but no keyboard controller, no VGA, and no clock with an interrupt.
    fadt.iapc_boot_arch = (ISA_DEVICES | NO_VGA | NO_CLOCK).into();
    match facs {
        None => {
            fadt = fadt.flag(Flags::HwReducedAcpi);
            fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
            fadt.sleep_status_reg = port(SLEEP_CONTROL_PORT + 1);
        }
        Some(facs) => {
            fadt = fadt.firmware_ctrl_64(facs);
            fadt.sci_int = SCI_GSI.into();
            fadt.pm1a_evt_blk = u32::from(POWER_PORTS).into();
            fadt.pm1_evt_len = 4;
            fadt.pm1a_cnt_blk = u32::from(POWER_PORTS + PM1_CONTROL).into();
            fadt.pm1_cnt_len = 2;
            fadt.pm_tmr_blk = u32::from(POWER_PORTS + TIMER).into();
            fadt.pm_tmr_len = 4;
            // Processors do not sleep deeper than by HLT.
            (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NO_DEEP_SLEEP.into(), NO_DEEP_SLEEP.into());
        }
    }
    to_bytes(&fadt.finalize())
}

fn madt(cpus: u32, hardware: AcpiHardware) -> Result<Vec<u8>> {
    let mut madt =
        MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC_ADDRESS));
    for cpu in 0..cpus {
        let id = u8::try_from(cpu).ok().filter(|_| cpus <= MAX_CPUS);
        let id = id.ok_or_else(|| Error::Invalid(format!("at most {MAX_CPUS} processors, not {cpus}")))?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_ADDRESS, 0));
    let isa_override = |gsi: u32, flags: u8| {
        let bytes = gsi.to_le_bytes();
        Override([ISA_OVERRIDE, 10, 0, bytes[0], bytes[0], bytes[1], bytes[2], bytes[3], flags, 0])
    };
    madt.add_structure(isa_override(COM1_GSI, EDGE_HIGH));
    if hardware == AcpiHardware::Full {
        madt.add_structure(isa_override(SCI_GSI.into(), LEVEL_HIGH));
    }
    madt.add_structure(LocalNmi([LOCAL_NMI, 6, 0xFF, 0, 0, 1]));
    let mut bytes = to_bytes(&madt);
    if hardware == AcpiHardware::Full {
        bytes[MADT_FLAGS_AT] |= OLD_CONTROLLERS;
        bytes[CHECKSUM_AT] = bytes[CHECKSUM_AT].wrapping_sub(OLD_CONTROLLERS);
    }
    Ok(bytes)
}

/// An interrupt source override (ACPI 6.4, section 5.2.12.5).
#[derive(Clone, Copy, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct Override([u8; 10]);

/// Which pin of the local APIC is the non-maskable interrupt (ACPI 6.4, section 5.2.12.7).
#[derive(Clone, Copy, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C)]
struct LocalNmi([u8; 6]);

impl Aml for Override {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

impl Aml for LocalNmi {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

fn dsdt() -> Vec<u8> {
    let window_end = u32::try_from(layout::PCI_WINDOW_END - 1).expect("below 4 GiB");
    let window_start = u32::try_from(layout::PCI_WINDOW_START).expect("below 4 GiB");
    let pci = Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::<u16>::new_bus_number(0, 0),
                    &IO::new(CONFIG_PORTS, CONFIG_PORTS, 1, 8),
                    &AddressSpace::<u16>::new_io(0, CONFIG_PORTS - 1, None),
                    &AddressSpace::<u16>::new_io(CONFIG_PORTS + 8, u16::MAX, None),
                    &AddressSpace::<u32>::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        window_start,
                        window_end,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_vec();
    let serial = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_STA".into(), &0xFu8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(COM1_PORTS, COM1_PORTS, 1, 8),
                    &Interrupt::new(true, true, false, false, COM1_GSI),
                ]),
            ),
        ],
    )
    .to_vec();
    let button =
        Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_vec();
    // A hardware-reduced board tells of events by this device (ACPI 6.4, section 5.6.9).
    let events = Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, POWER_BUTTON_GSI)]),
            ),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &0x80u8)]),
        ],
    )
    .to_vec();
    let board: Vec<&dyn Aml> = vec![&pci, &serial, &button, &events];
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&to_bytes(&Scope::new("\\_SB_".into(), board)));
    let off = Package::new(vec![&SLEEP_TYPE_OFF]);
    dsdt.append_slice(&to_bytes(&Name::new("\\_S5_".into(), &off)));
    dsdt.as_slice().to_vec()
}

/// AML that is made already.
trait Made {
    fn to_vec(&self) -> Bytes;
}

/// See [`Made`].
struct Bytes(Vec<u8>);

impl Made for Device<'_> {
    fn to_vec(&self) -> Bytes {
        Bytes(to_bytes(self))
    }
}

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
    }

    #[test]
    fn every_table_is_reached_and_adds_up() {
        for hardware in [AcpiHardware::Reduced, AcpiHardware::Full] {
            let base = layout::ACPI_TABLES.0;
            let AcpiTables { bytes, .. } =
                tables(base, layout::ACPI_TABLES_END, 4, hardware).expect("they fit");
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let at = |address: usize| address - usize::try_from(base).expect("below 1 MiB");
            let table = |start: usize| &bytes[start..start + word(&bytes, start + 4)];
            let xsdt = table(at(word(&bytes, 24)));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let names: Vec<&[u8]> =
                xsdt[36..].chunks(8).map(|entry| &table(at(word(entry, 0)))[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC"]);
            for entry in xsdt[36..].chunks(8) {
                assert_eq!(sum(table(at(word(entry, 0)))), 0);
            }
            let fadt = table(at(word(xsdt, 36)));
            let dsdt = table(at(word(fadt, 140)));
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        }
    }

    #[test]
    fn too_many_processors_are_refused() {
        assert!(
            tables(layout::ACPI_TABLES.0, layout::ACPI_TABLES_END, MAX_CPUS, AcpiHardware::Reduced).is_ok()
        );
        assert!(
            tables(layout::ACPI_TABLES.0, layout::ACPI_TABLES_END, MAX_CPUS + 1, AcpiHardware::Full).is_err()
        );
    }
}
