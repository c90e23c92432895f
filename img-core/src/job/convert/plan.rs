//! What is to be done with each guest byte: the one walk over the sources that feeds the whole job.
//!
//! The walk comes first, as progress needs to know how much there is to copy. Its result is kept, so that
//! tables and host holes are asked for once; a map with more runs than [`MAX_KEPT_RUNS`] is kept up to there and
//! walked again from there on.

use std::{collections::VecDeque, ops::Range};

use super::source::{Source, Sources};
use crate::{
    Result,
    format::DirtyMap,
    job::status::{OnLost, Walk},
};

/// How many runs of a map are kept: 16 MiB of them.
const MAX_KEPT_RUNS: usize = 1 << 20;

/// How the bytes of a run are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// They are read and written.
    Data,
    /// The target must read as zeroes there.
    Zero,
    /// The target's backing file has them already.
    Backing,
}

/// A run of one class, up to `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) end: u64,
    pub(super) class: Class,
}

/// What decides the class of a run.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// The target shares the source's backing file, which is this long (`u64::MAX` when unknown).
    pub(super) target_backing_bytes: Option<u64>,
    /// Whether neighbours of one class are joined, though they lie in different places.
    pub(super) join: bool,
    /// Told of sectors whose place is not known, which are then read regardless.
    pub(super) on_lost: Option<OnLost<'a>>,
    /// What a bitmap of the only source does not mark is left as the target has it.
    pub(super) marks: Option<&'a DirtyMap>,
}

/// The runs of all sources, one behind the other.
struct Runs<'a> {
    sources: &'a Sources<'a>,
    rules: Rules<'a>,
    at: u64,
    source: usize,
    walk: Option<Walk<'a>>,
    pending: VecDeque<Run>,
}

impl<'a> Runs<'a> {
    /// From `at` on, where a run begins.
    fn new(sources: &'a Sources<'a>, rules: Rules<'a>, at: u64) -> Self {
        Self { sources, rules, at, source: sources.index_at(at), walk: None, pending: VecDeque::new() }
    }

    fn next(&mut self) -> Result<Option<Run>> {
        let Some(mut run) = self.next_unjoined()? else { return Ok(None) };
        while self.rules.join {
            match self.next_unjoined()? {
                Some(next) if next.class == run.class => run.end = next.end,
                Some(other) => {
                    self.pending.push_front(other);
                    break;
                }
                None => break,
            }
        }
        Ok(Some(run))
    }

    fn next_unjoined(&mut self) -> Result<Option<Run>> {
        if let Some(pending) = self.pending.pop_front() {
            return Ok(Some(pending));
        }
        while let Some(source) = self.sources.get(self.source) {
            let Source { base, part, padded_bytes, .. } = source;
            let inside = self.at - base;
            if self.walk.is_none() {
                let marked = self.marked_from(source, inside);
                if marked.start > inside {
                    self.at = base + marked.start;
                    return Ok(Some(Run { end: self.at, class: Class::Backing }));
                }
                self.walk = Some(self.walk_of(source, marked));
            }
            let walk = self.walk.as_mut().expect("set above");
            if let Some(status) = walk.next()? {
                let (start, end) = (status.start - part.start, status.end() - part.start);
                self.at = base + end;
                return Ok(Some(self.classify(*base, start, end, status.data, status.zero)));
            }
            self.walk = None;
            if inside < part.end - part.start {
                // Behind one marked range there may be another.
                continue;
            }
            self.source += 1;
            if inside < *padded_bytes {
                // A last sector that the source has in part only.
                self.at = base + padded_bytes;
                return Ok(Some(Run { end: self.at, class: Class::Zero }));
            }
        }
        Ok(None)
    }

    /// The next range of a source to look at, from `inside` it on: the rest of it, or what is marked there first.
    fn marked_from(&self, source: &Source<'a>, inside: u64) -> Range<u64> {
        let end = source.part.end - source.part.start;
        match self.rules.marks {
            None => inside..end,
            Some(marks) => {
                let marked =
                    marks.next_dirty(source.part.start + inside.min(end)).unwrap_or(u64::MAX..u64::MAX);
                marked.start.saturating_sub(source.part.start).min(end)
                    ..marked.end.saturating_sub(source.part.start).min(end)
            }
        }
    }

    /// Over a range of a source.
    fn walk_of(&self, source: &Source<'a>, range: Range<u64>) -> Walk<'a> {
        let Source { image, part, .. } = source;
        let walk = Walk::new(image, self.source, part.start + range.start, part.start + range.end);
        let walk = if self.rules.target_backing_bytes.is_some() { walk.top_only() } else { walk };
        match self.rules.on_lost {
            None => walk,
            Some(on_lost) => walk.salvaging(on_lost),
        }
    }

    /// The class of `start..end` of the source at `base`, or of the first part of it.
    fn classify(&mut self, base: u64, start: u64, end: u64, data: bool, zero: bool) -> Run {
        let (start, end) = (base + start, base + end);
        let class = match (self.rules.target_backing_bytes, zero, data) {
            (None, true, _) => Class::Zero,
            (None, false, _) | (Some(_), false, true) => Class::Data,
            (Some(_), false, false) => Class::Backing,
            // Behind the end of the target's backing file zeroes are there without being written.
            (Some(backing), true, _) if start >= backing => Class::Backing,
            (Some(backing), true, _) if end > backing => {
                self.pending.push_back(Run { end, class: Class::Backing });
                return Run { end: backing, class: Class::Zero };
            }
            (Some(_), true, _) => Class::Zero,
        };
        Run { end, class }
    }
}

/// The result of the first walk.
pub(super) struct Plan<'a> {
    sources: &'a Sources<'a>,
    rules: Rules<'a>,
    runs: Vec<Run>,
    /// Where the kept runs end: the end of the sources, unless there are too many.
    kept_to: u64,
    /// Compressed clusters are written as a whole: their size.
    whole_clusters: Option<u64>,
}

impl<'a> Plan<'a> {
    /// Walks all sources.
    ///
    /// # Errors
    /// [`Error::Job`](crate::Error::Job) that names the source whose map cannot be read.
    pub(super) fn new(
        sources: &'a Sources<'a>,
        rules: Rules<'a>,
        whole_clusters: Option<u64>,
    ) -> Result<Self> {
        let mut walk = Runs::new(sources, rules, 0);
        let (mut runs, mut kept_to) = (Vec::new(), 0);
        while runs.len() < MAX_KEPT_RUNS
            && let Some(run) = walk.next()?
        {
            kept_to = run.end;
            runs.push(run);
        }
        Ok(Self { sources, rules, runs, kept_to, whole_clusters })
    }

    /// All pieces from the start.
    pub(super) fn pieces(&self) -> Pieces<'_> {
        Pieces { plan: self, index: 0, beyond: None, run: None, run_start: 0, at: 0 }
    }
}

/// A part of the disk that is copied at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) class: Class,
    /// How far into its run it begins.
    pub(super) run_offset: u64,
    /// From its start to the end of its run.
    pub(super) run_left: u64,
}

/// How large pieces may be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    /// As large as runs are.
    Nowhere,
    /// At multiples of so many bytes.
    At(u64),
    /// After so many bytes, counted from where the run begins.
    After(u64),
}

/// The pieces of a plan, in order.
pub(super) struct Pieces<'a> {
    plan: &'a Plan<'a>,
    index: usize,
    beyond: Option<Runs<'a>>,
    run: Option<Run>,
    run_start: u64,
    at: u64,
}

impl Pieces<'_> {
    /// The next piece; `cut` limits those that `is_cut` names.
    pub(super) fn next(&mut self, cut: Cut, is_cut: impl Fn(Class) -> bool) -> Result<Option<Piece>> {
        while self.run.is_none_or(|run| run.end <= self.at) {
            self.run = self.next_run()?;
            self.run_start = self.at;
            if self.run.is_none() {
                return Ok(None);
            }
        }
        let Some(Run { end, mut class }) = self.run else { return Ok(None) };
        let mut len = end - self.at;
        if let Some(cluster) = self.plan.whole_clusters {
            if len < cluster {
                // Holes inside a cluster are written with it.
                class = Class::Data;
                len = cluster.min(self.plan.sources.len_bytes() - self.at);
            } else {
                len -= len % cluster;
            }
        }
        if is_cut(class) {
            len = match cut {
                Cut::Nowhere => len,
                Cut::At(bytes) => len.min(bytes - self.at % bytes),
                Cut::After(bytes) => len.min(bytes),
            };
        }
        let run_left = len.max(end - self.at);
        let piece = Piece { start: self.at, len, class, run_offset: self.at - self.run_start, run_left };
        self.at += len;
        Ok(Some(piece))
    }

    fn next_run(&mut self) -> Result<Option<Run>> {
        if let Some(run) = self.plan.runs.get(self.index) {
            self.index += 1;
            return Ok(Some(*run));
        }
        if self.plan.kept_to >= self.plan.sources.len_bytes() {
            return Ok(None);
        }
        let (plan, kept_to) = (self.plan, self.plan.kept_to);
        self.beyond.get_or_insert_with(|| Runs::new(plan.sources, plan.rules, kept_to)).next()
    }
}
