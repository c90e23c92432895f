//! The real-time clock and its CMOS memory (Motorola MC146818), with what firmware looks for in it.

use std::{
    sync::{Arc, Mutex},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{bus::PortDevice, machine::LOW_RAM_LIMIT};

/// Index and data port.
pub const RTC_PORTS: u16 = 0x70;
/// The two of them.
pub const RTC_PORT_COUNT: u16 = 2;

const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const STATUS_C: u8 = 0x0C;
const STATUS_D: u8 = 0x0D;
const CENTURY: u8 = 0x32;

/// Status B: hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Status B: numbers are binary, not decimal digits.
const BINARY: u8 = 1 << 2;
/// Status D: the battery is good.
const BATTERY_GOOD: u8 = 1 << 7;
/// Status A: the divider of a 32768 Hz crystal, 1024 Hz rate.
const DIVIDER: u8 = 0x26;

/// Clock and memory. The time is the host's, in UTC; a guest may set it, and it stays the host's.
#[derive(Debug)]
pub struct Rtc {
    memory: [u8; 128],
    index: u8,
}

impl Rtc {
    /// A clock on a machine with so much RAM.
    #[must_use]
    pub fn new(ram_bytes: u64, cpus: u32) -> Arc<Mutex<Self>> {
        let mut memory = [0; 128];
        memory[usize::from(STATUS_A)] = DIVIDER;
        memory[usize::from(STATUS_B)] = HOURS_24;
        memory[usize::from(STATUS_D)] = BATTERY_GOOD;
        let low = ram_bytes.min(LOW_RAM_LIMIT);
        let high = ram_bytes - low;
        let mut put = |at: usize, value: u64, bytes: usize| {
            memory[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        // Base memory in KiB; RAM above 1 MiB in KiB; above 16 MiB and above 4 GiB in 64 KiB.
        put(0x15, 640, 2);
        put(0x17, (low.saturating_sub(1 << 20) >> 10).min(0xFFFF), 2);
        put(0x30, (low.saturating_sub(1 << 20) >> 10).min(0xFFFF), 2);
        put(0x34, (low.saturating_sub(16 << 20) >> 16).min(0xFFFF), 2);
        put(0x5B, high >> 16, 3);
        put(0x5F, u64::from(cpus.saturating_sub(1)).min(255), 1);
        // Boot from the hard disk first, and do not ask for a floppy disk's signature.
        put(0x3D, 2, 1);
        put(0x38, 1, 1);
        Arc::new(Mutex::new(Self { memory, index: 0 }))
    }

    fn read_register(&self, now: SystemTime) -> u8 {
        let time = Civil::of(now);
        let number = match self.index {
            0x00 => time.second,
            0x02 => time.minute,
            0x04 => return self.hour(time.hour),
            0x06 => time.weekday,
            0x07 => time.day,
            0x08 => time.month,
            0x09 => u8::try_from(time.year % 100).unwrap_or(0),
            CENTURY => u8::try_from(time.year / 100).unwrap_or(0),
            // Reading it clears it, and no interrupt is ever pending.
            STATUS_C => return 0,
            index => return self.memory[usize::from(index)],
        };
        self.digits(number)
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.memory[usize::from(STATUS_B)] & HOURS_24 != 0 {
            return self.digits(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.digits((hour + 11) % 12 + 1) | afternoon
    }

    fn digits(&self, number: u8) -> u8 {
        if self.memory[usize::from(STATUS_B)] & BINARY != 0 {
            number
        } else {
            ((number / 10) << 4) | (number % 10)
        }
    }
}

impl PortDevice for Rtc {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        if offset == 1 {
            data[0] = self.read_register(SystemTime::now());
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        match (offset, self.index) {
            // The highest bit masks the non-maskable interrupt, of which there is none.
            (0, _) => self.index = data[0] & 0x7F,
            // The clock shows the host's time.
            (_, 0x00 | 0x02 | 0x04 | 0x06..=0x09 | CENTURY | STATUS_C | STATUS_D) => {}
            (_, index) => self.memory[usize::from(index)] = data[0],
        }
    }
}

/// A moment in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Civil {
    second: u8,
    minute: u8,
    hour: u8,
    /// Sunday is 1.
    weekday: u8,
    day: u8,
    month: u8,
    year: u64,
}

impl Civil {
    fn of(now: SystemTime) -> Self {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (days, in_day) = (seconds / 86_400, seconds % 86_400);
        let byte = |number: u64| u8::try_from(number).unwrap_or(0);
        // Days since 0000-03-01, so that leap days end a year.
        let days_since_march = days + 719_468;
        let (era, in_era) = (days_since_march / 146_097, days_since_march % 146_097);
        let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
        let in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * in_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            second: byte(in_day % 60),
            minute: byte(in_day / 60 % 60),
            hour: byte(in_day / 3600),
            weekday: byte((days + 4) % 7 + 1),
            day: byte(in_year - (153 * month_from_march + 2) / 5 + 1),
            month: byte(month),
            year: era * 400 + year_of_era + u64::from(month <= 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Civil {
        Civil::of(UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |civil: Civil| (civil.year, civil.month, civil.day, civil.weekday);
        assert_eq!(date(at(0)), (1970, 1, 1, 5));
        assert_eq!(date(at(951_782_400)), (2000, 2, 29, 3));
        assert_eq!(date(at(4_107_542_400)), (2100, 3, 1, 2));
        let evening = at(1_795_302_245);
        assert_eq!((evening.hour, evening.minute, evening.second), (23, 4, 5));
    }

    #[test]
    fn numbers_come_in_the_form_that_status_b_asks_for() {
        let rtc = Rtc::new(5 << 30, 2);
        let mut rtc = rtc.lock().expect("no panic");
        let noon = UNIX_EPOCH + Duration::from_secs(59 + 59 * 60 + 23 * 3600);
        let read = |rtc: &mut Rtc, index: u8| {
            rtc.write(0, &[index]);
            rtc.read_register(noon)
        };
        assert_eq!([read(&mut rtc, 0), read(&mut rtc, 4), read(&mut rtc, CENTURY)], [0x59, 0x23, 0x19]);
        rtc.write(0, &[STATUS_B]);
        rtc.write(1, &[BINARY]);
        assert_eq!([read(&mut rtc, 0), read(&mut rtc, 4)], [59, 11 | 0x80]);
        assert_eq!([read(&mut rtc, 0x5B), read(&mut rtc, 0x5C)], [0, 0x80]);
        assert_eq!(read(&mut rtc, STATUS_D), BATTERY_GOOD);
    }
}
