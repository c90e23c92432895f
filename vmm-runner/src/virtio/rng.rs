//! The entropy device (section 5.4): random bytes of the host.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::Bytes;

use super::{FEATURE_VERSION_1, QueueSetup, QueueThread, VirtioDevice};
use crate::{Result, machine::GuestMemory};

/// The driver's buffers are filled in pieces of this size, and no buffer gets more.
const PIECE_BYTES: usize = 256;
const QUEUE_SIZE: u16 = 64;

/// Random bytes for the guest.
#[derive(Debug, Default)]
pub struct Entropy {
    thread: Option<QueueThread>,
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u16 {
        4
    }

    fn pci_class(&self) -> u32 {
        // No class of PCI fits.
        0xFF_0000
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, memory: &Arc<GuestMemory>, features: u64, queues: Vec<QueueSetup>) -> Result<()> {
        let Some(queue) = queues.into_iter().next() else { return Ok(()) };
        let serve = |chain: virtio_queue::DescriptorChain<&GuestMemory>| {
            let memory = chain.memory().clone();
            let mut written = 0;
            for descriptor in chain.writable() {
                let mut bytes = [0; PIECE_BYTES];
                let wanted = (descriptor.len() as usize).min(PIECE_BYTES);
                // The host's pool never runs dry after boot; what could not be got is not given.
                let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
                // A buffer outside of memory gets nothing.
                if memory.write_slice(&bytes[..got], descriptor.addr()).is_err() {
                    break;
                }
                written += u32::try_from(got).unwrap_or(0);
                if got < descriptor.len() as usize {
                    break;
                }
            }
            written
        };
        self.thread = Some(QueueThread::start("virtio-rng", memory, queue, features, Box::new(serve))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.thread = None;
    }

    fn pause(&self) {
        self.thread.iter().for_each(QueueThread::pause);
    }

    fn resume(&self) {
        self.thread.iter().for_each(QueueThread::resume);
    }
}
