//! What the guest is told of its processors: what KVM supports, with this machine's topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::{Error, Result};

/// Leaf 1, ECX: the local APIC's timer takes deadlines.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor. Without it Linux looks for no KVM and has no clock.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: MONITOR and MWAIT, which a guest that shares its processor must not use.
const MONITOR: u32 = 1 << 3;
/// Leaf 1, EDX: several logical processors in a package.
const MULTI_THREADING: u32 = 1 << 28;
/// Leaf 0x80000007, EDX: the time stamp counter never stops. Linux would take its time from there rather than from
/// KVM's clock, and would see it jump by as long as the machine was held.
const INVARIANT_TSC: u32 = 1 << 8;
/// KVM's leaf of features.
const KVM_FEATURES: u32 = 0x4000_0001;

/// What KVM supports on this host; read once.
pub(super) fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("supported CPUID"))
}

/// The leaves of one of `cpus` processors, all cores of one package.
pub(super) fn for_cpu(kvm: &Kvm, supported: &CpuId, cpu: u32, cpus: u32) -> Result<CpuId> {
    let entries = leaves(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer), cpu, cpus);
    debug_assert!(entries.iter().any(|entry| entry.function == KVM_FEATURES));
    CpuId::from_entries(&entries)
        .map_err(|_| Error::Invalid("KVM supports more CPUID leaves than it takes".to_owned()))
}

fn leaves(
    supported: &[kvm_cpuid_entry2],
    has_deadline_timer: bool,
    cpu: u32,
    cpus: u32,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    // Said anew below.
    entries.retain(|entry| !matches!(entry.function, 0xB | 0x1F));
    let has_extended_topology = entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xB);
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !MONITOR;
                if has_deadline_timer {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.ebx = entry.ebx & 0xFFFF | cpus.min(255) << 16 | cpu << 24;
                if cpus > 1 {
                    entry.edx |= MULTI_THREADING;
                }
            }
            // Cores that share a cache, and cores of the package (Intel).
            4 => {
                entry.eax &= 0x3FFF;
                if entry.eax & 0x1F != 0 {
                    entry.eax |= (cpus.next_power_of_two() - 1).min(63) << 26;
                    // The last level is shared by all of them.
                    if entry.eax >> 5 & 7 >= 3 {
                        entry.eax |= (cpus.next_power_of_two() - 1).min(4095) << 14;
                    }
                }
            }
            0x8000_0007 => entry.edx &= !INVARIANT_TSC,
            // Cores of the package (AMD).
            0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | apic_id_bits(cpus) << 12 | (cpus - 1).min(255),
            0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (cpu, cpu & 0xFF, 0),
            // The monitor leaf goes with its feature.
            5 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    if has_extended_topology {
        entries.extend(topology(cpu, cpus));
    }
    entries
}

/// Leaf 0xB: one thread a core, all cores in one package.
fn topology(cpu: u32, cpus: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: cpu,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, apic_id_bits(cpus), cpus, 2), level(2, 0, 0, 0)]
}

/// Bits of an APIC id that tell the cores of the package apart.
fn apic_id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_held_guest_would_be_misled_by_is_not_told() {
        let all = |function| kvm_cpuid_entry2 { function, ecx: !0, edx: !0, ..Default::default() };
        let told = leaves(&[all(1), all(0x8000_0007)], false, 0, 1);
        assert_eq!((told[0].ecx & MONITOR, told[0].ecx & HYPERVISOR), (0, HYPERVISOR));
        assert_eq!(told[1].edx, !INVARIANT_TSC);
    }

    #[test]
    fn the_topology_counts_all_cores_and_ends() {
        let levels = topology(2, 3);
        assert_eq!((levels[0].eax, levels[0].ebx, levels[0].ecx), (0, 1, 1 << 8));
        assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx), (2, 3, 1 | 2 << 8));
        assert_eq!((levels[2].ebx, levels[2].ecx), (0, 2));
        assert!(levels.iter().all(|level| level.edx == 2));
    }
}
