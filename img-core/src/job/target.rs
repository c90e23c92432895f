//! The target of a job: reserving in order, moving bytes in parallel, committing.
//!
//! From the first reservation to the commit of the last a thread holds one [`Pass`]: whoever has the image alone may wait for
//! a reservation, so nobody who has one may wait for him. With a pass in hand, neither a turn is waited for nor anything
//! called that enters the image.

use std::{io::IoSlice, ops::Range};

use crate::{
    Error, JobStep, Result,
    format::{Codec, CompressedWrites, Frame, HostFile, Layer, LayerWriter, PreparedWrite, WriteStep},
    image::{Image, Pass},
    storage::{Preallocation, Storage},
};

/// The top layer of the target, as the job writes it.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    image: &'a Image,
    layer: &'a dyn Layer,
    writer: &'a dyn LayerWriter,
    /// Writes that begin in the same block of this size exclude each other between prepare and commit.
    pub(super) cluster_bytes: u64,
    /// What is written as a whole or not at all.
    pub(super) unit_bytes: u64,
    /// Whether the host may take the space of what is written at once.
    takes_space_ahead: bool,
}

/// Reserved, and where in the buffer its bytes are.
pub(super) struct Reserved<'a> {
    write: PreparedWrite<'a>,
    bytes: Range<usize>,
}

impl<'a> Target<'a> {
    /// # Errors
    /// [`Error::ReadOnly`] when the target was not opened for writing.
    pub(super) fn new(image: &'a Image) -> Result<Self> {
        let layer = image.layers()[0].as_ref();
        let storage = layer.file(HostFile::IMAGE).expect("every layer has its image file");
        let Some(writer) = layer.writer() else {
            return Err(Error::ReadOnly { file: storage.path().to_owned() });
        };
        let (cluster_bytes, unit_bytes) = match layer.cluster_size_bytes() {
            None => (1, 1),
            Some(cluster) => (u64::from(cluster), writer.zero_granularity_bytes()),
        };
        Ok(Self { image, layer, writer, cluster_bytes, unit_bytes, takes_space_ahead: true })
    }

    /// The same for short pieces from all over the disk: taking space ahead for each costs more than it saves.
    pub(super) fn scattered(self) -> Self {
        Self { takes_space_ahead: false, ..self }
    }

    /// Whether reserving takes new places, so that the order in which it happens can be seen in the file.
    pub(super) fn allocates(&self) -> bool {
        self.layer.cluster_size_bytes().is_some()
    }

    /// How it is compressed, when that is `wanted` or the only way to write it; `None` for plain writes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is wanted and there is no way, [`Error::Invalid`] where there are no clusters
    /// to be compressed.
    pub(super) fn compression(&self, wanted: bool) -> Result<Option<Codec>> {
        let refused = || {
            let file = self.layer.file(HostFile::IMAGE).expect("every layer has its image file");
            Error::unsupported(file.path(), "writing compressed clusters")
        };
        match self.layer.compressed_writes() {
            CompressedWrites::OnlyInOrder => self.layer.compression().map(Some).ok_or_else(refused),
            _ if !wanted => Ok(None),
            CompressedWrites::Refused => Err(refused()),
            CompressedWrites::StoredPlain if self.layer.cluster_size_bytes().is_none() => {
                Err(Error::Invalid("invalid cluster size".to_owned()))
            }
            CompressedWrites::StoredPlain => Ok(None),
            CompressedWrites::Accepted => self.layer.compression().map(Some).ok_or_else(refused),
        }
    }

    /// Whether it can only be written in guest order.
    pub(super) fn is_in_order_only(&self) -> bool {
        self.layer.compressed_writes() == CompressedWrites::OnlyInOrder
    }

    pub(super) fn image(&self) -> &'a Image {
        self.image
    }

    /// Reserves the places of `guest_bytes`, whose first byte is at `at` in the buffer.
    pub(super) fn reserve(
        &self,
        _pass: &Pass<'_>,
        guest_bytes: Range<u64>,
        at: usize,
        reserved: &mut Vec<Reserved<'a>>,
    ) -> Result<()> {
        let (mut from, mut at) = (guest_bytes.start, at);
        while from < guest_bytes.end {
            let write =
                self.writer.prepare_write(from..guest_bytes.end).map_err(|error| write_error(from, error))?;
            let covered = write.step().guest_bytes.end - from;
            from += covered;
            let end = at + usize::try_from(covered).expect("inside the buffer");
            reserved.push(Reserved { write, bytes: at..end });
            at = end;
        }
        Ok(())
    }

    /// Reserves the place of the compressed form, at `bytes` in the buffer, of the cluster at `guest_offset`.
    pub(super) fn reserve_compressed(
        &self,
        _pass: &Pass<'_>,
        guest_offset: u64,
        bytes: Range<usize>,
    ) -> Result<Reserved<'a>> {
        let stored = u32::try_from(bytes.len()).expect("less than a cluster");
        let write = self
            .writer
            .prepare_compressed(guest_offset, stored)
            .map_err(|error| write_error(guest_offset, error))?;
        Ok(Reserved { write, bytes })
    }

    /// Moves the bytes of `buf` to where they were reserved, neighbours on the host at once, and commits.
    pub(super) fn write(&self, pass: &Pass<'_>, buf: &[u8], reserved: &mut Vec<Reserved<'a>>) -> Result<()> {
        let mut from = 0;
        while from < reserved.len() {
            let mut to = from + 1;
            while to < reserved.len() && reserved[to].stands_behind(&reserved[to - 1]) {
                to += 1;
            }
            self.write_run(pass, buf, &reserved[from..to])
                .map_err(|error| write_error(reserved[from].step().guest_bytes.start, error))?;
            from = to;
        }
        Self::commit(reserved)
    }

    /// Writes reservations that stand one behind the other on the host, with the fill before the first and the one
    /// behind the last.
    fn write_run(&self, pass: &Pass<'_>, buf: &[u8], run: &[Reserved<'a>]) -> Result<()> {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let before = self.fill(pass, first.step().guest_bytes.start, first.step().fill_before_bytes, true)?;
        let after = self.fill(pass, last.step().guest_bytes.end, last.step().fill_after_bytes, false)?;
        let start = first.host().start - before.len() as u64;
        let file = self.file(first.step().file)?;
        if self.takes_space_ahead {
            file.will_write(start..last.host().end + after.len() as u64);
        }
        if run.iter().all(|reserved| *reserved.write.frame() == Frame::default()) {
            let bytes = &buf[first.bytes.start..last.bytes.end];
            return file.write_vectored_at(
                &[IoSlice::new(&before), IoSlice::new(bytes), IoSlice::new(&after)],
                start,
            );
        }
        let pads: Vec<Vec<u8>> =
            run.iter().map(|reserved| vec![0; reserved.write.frame().pad_bytes as usize]).collect();
        let mut slices = vec![IoSlice::new(&before)];
        for (reserved, pad) in run.iter().zip(&pads) {
            slices.push(IoSlice::new(reserved.write.frame().lead()));
            slices.push(IoSlice::new(&buf[reserved.bytes.clone()]));
            slices.push(IoSlice::new(pad));
        }
        slices.push(IoSlice::new(&after));
        file.write_vectored_at(&slices, start)
    }

    /// What the guest reads now in the `len` bytes before or behind `at`. Zeroes are written too, even where the
    /// host has them already: the reference also takes the whole cluster's space.
    fn fill(&self, pass: &Pass<'_>, at: u64, len: u64, before: bool) -> Result<Vec<u8>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; usize::try_from(len).expect("less than a cluster")];
        let from = if before { at - len } else { at };
        // A cluster may reach past the end of the disk; what is there is written as zeroes.
        let in_disk = self.image.virtual_size_bytes().saturating_sub(from).min(len);
        let in_disk = usize::try_from(in_disk).expect("at most len");
        self.image.read_with(pass, &mut bytes[..in_disk], from)?;
        Ok(bytes)
    }

    /// Makes the map point at what was written.
    pub(super) fn commit(reserved: &mut Vec<Reserved<'a>>) -> Result<()> {
        for Reserved { write, .. } in reserved.drain(..) {
            let at = write.step().guest_bytes.start;
            write.commit().map_err(|error| write_error(at, error))?;
        }
        Ok(())
    }

    /// Ends the image file on a sector, as the reference does behind compressed clusters.
    pub(super) fn pad_to_sector(&self) -> Result<()> {
        let file = self.layer.file(HostFile::IMAGE).expect("every layer has its image file");
        let len_bytes = file.len_bytes()?;
        if len_bytes.is_multiple_of(512) {
            return Ok(());
        }
        file.resize(len_bytes.next_multiple_of(512), Preallocation::Off)
    }

    pub(super) fn file(&self, file: HostFile) -> Result<&'a dyn Storage> {
        match self.layer.file(file) {
            Some(storage) => Ok(storage.as_ref()),
            None => Err(Error::Invalid(format!("the target has no host file {}", file.0))),
        }
    }
}

impl Reserved<'_> {
    pub(super) fn step(&self) -> &WriteStep {
        self.write.step()
    }

    /// Where it stands on the host, with its frame and without fills.
    fn host(&self) -> Range<u64> {
        let (step, frame) = (self.step(), self.write.frame());
        let end = step.at.0 + self.bytes.len() as u64 + u64::from(frame.pad_bytes); // set aside by the format
        step.at.0 - frame.lead().len() as u64..end
    }

    /// Whether one write can move both: nothing lies between them on the host or in the buffer.
    fn stands_behind(&self, previous: &Self) -> bool {
        let (step, before) = (self.step(), previous.step());
        step.file == before.file
            && before.fill_after_bytes == 0
            && step.fill_before_bytes == 0
            && previous.bytes.end == self.bytes.start
            && previous.host().end == self.host().start
    }
}

/// An error of writing guest bytes at `at_bytes`.
pub(super) fn write_error(at_bytes: u64, error: Error) -> Error {
    Error::Job { step: JobStep::Write, input: 0, at_bytes, source: Box::new(error) }
}
