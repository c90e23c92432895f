//! Port addresses: the only place that knows which device answers where.

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{Error, Result};

/// A device behind I/O ports. Offsets are those from its first port.
pub trait PortDevice: Send {
    /// Answers a read of one, two or four bytes. `data` is full of ones before.
    fn read(&mut self, offset: u16, data: &mut [u8]);

    /// Takes a write of one, two or four bytes.
    fn write(&mut self, offset: u16, data: &[u8]);
}

/// A device whose ports the guest moves. Shared by the processors.
pub trait MovablePorts: Send + Sync {
    /// Which of its ports this is now, if any.
    fn offset_of(&self, port: u16) -> Option<u16>;

    /// As [`PortDevice::read`].
    fn read(&self, offset: u16, data: &mut [u8]);

    /// As [`PortDevice::write`].
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device and its ports.
struct Claim {
    ports: Range<u32>,
    device: Arc<Mutex<dyn PortDevice>>,
}

/// All ports. Where nobody answers, reads give ones and writes go nowhere, as on a PC.
#[derive(Default)]
pub struct PortBus {
    /// By first port, without overlap.
    claims: Vec<Claim>,
    /// Asked where no claim is.
    movable: Vec<Arc<dyn MovablePorts>>,
}

impl fmt::Debug for PortBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.claims.iter().map(|claim| &claim.ports)).finish()
    }
}

impl PortBus {
    /// Gives `count` ports from `first` on to a device.
    ///
    /// # Errors
    /// When another device has one of them.
    pub fn claim(&mut self, first: u16, count: u16, device: Arc<Mutex<dyn PortDevice>>) -> Result<()> {
        let ports = u32::from(first)..u32::from(first) + u32::from(count);
        let index = self.claims.partition_point(|claim| claim.ports.start < ports.start);
        let before = index.checked_sub(1).and_then(|index| self.claims.get(index));
        let is_taken = before.is_some_and(|claim| claim.ports.end > ports.start)
            || self.claims.get(index).is_some_and(|claim| claim.ports.start < ports.end);
        if is_taken || ports.end > 0x1_0000 {
            return Err(Error::Invalid(format!("port {first:#x} has a device already")));
        }
        self.claims.insert(index, Claim { ports, device });
        Ok(())
    }

    /// Adds a device that answers wherever the guest puts it, but not in place of one that has its ports for good.
    pub fn add_movable(&mut self, device: Arc<dyn MovablePorts>) {
        self.movable.push(device);
    }

    /// One read by a processor.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((device, offset)) = self.find(port) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        } else if let Some((device, offset)) = self.find_movable(port) {
            device.read(offset, data);
        }
    }

    /// One write by a processor.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.find(port) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        } else if let Some((device, offset)) = self.find_movable(port) {
            device.write(offset, data);
        }
    }

    fn find_movable(&self, port: u16) -> Option<(&Arc<dyn MovablePorts>, u16)> {
        self.movable.iter().find_map(|device| device.offset_of(port).map(|offset| (device, offset)))
    }

    fn find(&self, port: u16) -> Option<(&Arc<Mutex<dyn PortDevice>>, u16)> {
        let index = self.claims.partition_point(|claim| claim.ports.start <= u32::from(port));
        let claim = self.claims.get(index.checked_sub(1)?)?;
        if !claim.ports.contains(&u32::from(port)) {
            return None;
        }
        let offset = u16::try_from(u32::from(port) - claim.ports.start).ok()?;
        Some((&claim.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Last(Vec<(u16, Vec<u8>)>);

    impl PortDevice for Last {
        fn read(&mut self, offset: u16, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap_or(0);
        }

        fn write(&mut self, offset: u16, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_that_claimed_the_port() {
        let device = Arc::new(Mutex::new(Last::default()));
        let mut bus = PortBus::default();
        bus.claim(0x70, 2, device.clone()).expect("free");
        bus.claim(0x3F8, 8, device.clone()).expect("free");
        assert!(bus.claim(0x71, 1, device.clone()).is_err());
        assert!(bus.claim(0x3F0, 9, device.clone()).is_err());
        bus.claim(0xFFFF, 1, device.clone()).expect("the last port");
        bus.write(0x3F9, &[1]);
        bus.write(0x400, &[2]);
        assert_eq!(device.lock().expect("no panic").0, [(1, vec![1])]);
        let mut data = [0; 2];
        bus.read(0x71, &mut data);
        assert_eq!(data, [1, 0xFF]);
        bus.read(0x80, &mut data);
        assert_eq!(data, [0xFF, 0xFF]);
    }
}
