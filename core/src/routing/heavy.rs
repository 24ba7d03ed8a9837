//! Which keys are hot: asked for more often than one pod should have to answer.
//!
//! The rule: memory is bounded by [`HotSettings::counters`], whatever keys come, and small while few come; a key is never
//! called hot below the threshold. It counts what it is shown: a gateway with one sketch per thread
//! shows each a part of the rate.
//!
//! ```text
//! cold --rate >= threshold--> hot --rate < threshold * cold_below--> cold
//! ```
//!
//! The frequent-items algorithm of Misra and Gries (1982), which is Space-Saving counted from the other
//! end (Agarwal et al., "Mergeable Summaries", 2012), over counts that fade: 16 times a window each
//! count is multiplied by 15/16, so that a steady rate r comes to r × window. Twice the threshold is
//! noticed after 0.7 windows.
//!
//! With m counters and N requests/s of all keys, a count is at most
//! `E = N * window / (m + 1) + 16` too low (16: what rounding down while fading costs) and never too
//! high. So with eps = E / (threshold * window):
//!
//! * no key with a steady rate above threshold × (1 + eps) is missed;
//! * no key below the threshold becomes hot;
//! * a hot key goes cold below threshold × (`cold_below` - eps), and never above
//!   threshold × `cold_below` while eps is less than that.
//!
//! 256 counters give eps = 6 % at 10,000 requests/s, 17 % at 40,000, if all keys are as frequent as each
//! other, and less if they are not. A threshold of few requests per window is beyond it, for the 16.

use std::time::Duration;

/// From when on a key is hot, and how exactly that is known.
#[derive(Clone, Debug, PartialEq)]
pub struct HotSettings {
    /// Requests/s from which a key is hot. Default 1,000.
    pub threshold: u32,
    /// A hot key goes cold below this share of the threshold. Default 0.5.
    pub cold_below: f64,
    /// The time that a rate is averaged over, 16 ms at least. Default 1 s.
    pub window: Duration,
    /// Keys counted at a time, 1 to 65,536. Default 256, which take up to 8 KiB.
    pub counters: usize,
}

impl Default for HotSettings {
    fn default() -> Self {
        Self { threshold: 1_000, cold_below: 0.5, window: Duration::from_secs(1), counters: 256 }
    }
}

/// Fadings in one window. Each leaves the share 1 - 1 / FADINGS.
const FADINGS: u32 = 16;

/// After so many fadings nothing is left: (15/16)^400 × 2^32 < 1.
const FORGOTTEN: u128 = 400;

/// Slots before any key came, and after all were forgotten: of many models most see few entities.
const FEWEST: usize = 8;

/// The sketch. Keys are hashes, such as [`super::key_hash`] gives; keys with one hash are one key.
#[derive(Clone, Debug)]
pub struct HotEntities {
    /// A hash table with open addressing and linear probing, at most half full.
    slots: Box<[Slot]>,
    used: usize,
    counters: usize,
    /// What counts are too low by, at most.
    error: f64,
    /// The time of the last fading.
    faded: Duration,
    step: Duration,
    hot_from: f64,
    cold_below: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    key: u64,
    /// 0: free.
    count: u32,
    hot: bool,
}

impl HotEntities {
    /// A sketch that has seen nothing. Values out of their bounds count as the nearest one within.
    pub fn new(settings: &HotSettings) -> Self {
        let counters = settings.counters.clamp(1, 1 << 16);
        let window = settings.window.max(Duration::from_millis(u64::from(FADINGS)));
        let hot_from = (f64::from(settings.threshold) * window.as_secs_f64()).max(1.0);
        Self {
            slots: slots(FEWEST),
            used: 0,
            counters,
            error: 0.0,
            faded: Duration::ZERO,
            step: window / FADINGS,
            hot_from,
            cold_below: hot_from * super::share_of(settings.cold_below),
        }
    }

    /// Counts one request for a key. Whether the key is hot.
    ///
    /// O(1) on the average over requests; allocates where it counts more keys at a time than ever since it was empty.
    pub fn observe(&mut self, key: u64, now: Duration) -> bool {
        self.fade(now);
        match self.find(key) {
            Ok(slot) => {
                let slot = &mut self.slots[slot];
                slot.count = slot.count.saturating_add(1);
                slot.hot |= f64::from(slot.count) >= self.hot_from;
                slot.hot
            }
            Err(_) if self.used < self.counters && 2 * (self.used + 1) > self.slots.len() => {
                self.grow();
                self.observe(key, now)
            }
            Err(free) if self.used < self.counters => {
                self.used += 1;
                let hot = self.hot_from <= 1.0;
                self.slots[free] = Slot { key, count: 1, hot };
                hot
            }
            // One request of each key that is counted goes out together with this one. Every such round
            // is paid for by as many requests that came in.
            Err(_) => {
                self.error += 1.0;
                self.retain(|slot| slot.count -= 1);
                false
            }
        }
    }

    /// Whether a key is hot, without counting anything.
    pub fn is_hot(&mut self, key: u64, now: Duration) -> bool {
        self.fade(now);
        self.find(key).is_ok_and(|slot| self.slots[slot].hot)
    }

    /// Keys that are hot. O(counters).
    pub fn count(&mut self, now: Duration) -> usize {
        self.fade(now);
        self.slots.iter().filter(|slot| slot.hot).count()
    }

    /// Does the fadings that are due, in one pass.
    fn fade(&mut self, now: Duration) {
        let due = now.saturating_sub(self.faded).as_nanos() / self.step.as_nanos();
        if due == 0 {
            return;
        }
        if due >= FORGOTTEN {
            (self.faded, self.error, self.used) = (now, 0.0, 0);
            self.slots = slots(FEWEST);
            return;
        }
        self.faded = self.faded.saturating_add(self.step.saturating_mul(due as u32));
        let left = (1.0 - 1.0 / f64::from(FADINGS)).powi(due as i32);
        self.error = self.error * left + 1.0;
        let cold_below = self.cold_below - self.error;
        self.retain(|slot| {
            slot.count = (f64::from(slot.count) * left) as u32;
            slot.hot &= f64::from(slot.count) >= cold_below;
        });
    }

    /// Twice the slots.
    fn grow(&mut self) {
        let twice = slots(2 * self.slots.len());
        for slot in std::mem::replace(&mut self.slots, twice) {
            if slot.count > 0
                && let Err(free) = self.find(slot.key)
            {
                self.slots[free] = slot;
            }
        }
    }

    /// The slot of a key, or the free one where it would be. At most `counters` steps, also for keys
    /// that were chosen to collide.
    fn find(&self, key: u64) -> Result<usize, usize> {
        let mut at = self.home(key);
        loop {
            match self.slots[at] {
                Slot { count: 0, .. } => return Err(at),
                slot if slot.key == key => return Ok(at),
                _ => at = self.after(at),
            }
        }
    }

    /// Changes every slot in use, once each, and frees those that come to zero.
    fn retain(&mut self, mut change: impl FnMut(&mut Slot)) {
        // From behind a free slot on, what closes a gap comes from slots that are still to be changed.
        let Some(mut at) = self.slots.iter().position(|slot| slot.count == 0) else { return };
        for _ in 0..self.slots.len() {
            while self.slots[at].count > 0 {
                change(&mut self.slots[at]);
                if self.slots[at].count > 0 {
                    break;
                }
                self.close(at);
            }
            at = self.after(at);
        }
    }

    /// Closes the gap that a freed slot leaves in its run (Knuth, TAOCP volume 3, 6.4, algorithm R).
    fn close(&mut self, mut gap: usize) {
        self.used -= 1;
        let mask = self.slots.len() - 1;
        let mut at = self.after(gap);
        while self.slots[at].count > 0 {
            let from_home = at.wrapping_sub(self.home(self.slots[at].key)) & mask;
            if from_home >= at.wrapping_sub(gap) & mask {
                self.slots[gap] = self.slots[at];
                gap = at;
            }
            at = self.after(at);
        }
        self.slots[gap] = Slot::default();
    }

    fn home(&self, key: u64) -> usize {
        key as usize & (self.slots.len() - 1)
    }

    fn after(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }
}

fn slots(count: usize) -> Box<[Slot]> {
    vec![Slot::default(); count].into()
}

#[cfg(test)]
#[path = "heavy_tests.rs"]
mod tests;
