//! Who holds most: a max-heap of holdings by bytes, in which every holding knows its place.
//!
//! A change costs O(log holdings), and next to nothing where the order stays.

use super::arena::NONE;

#[derive(Default)]
pub struct Shares {
    /// (bytes, holding), each at least as large as its children at 2i + 1 and 2i + 2.
    heap: Vec<(u64, u32)>,
    /// Place in the heap by holding.
    places: Vec<u32>,
}

impl Shares {
    /// The holding with most bytes.
    pub fn largest(&self) -> Option<(u32, u64)> {
        self.heap.first().map(|(bytes, holding)| (*holding, *bytes))
    }

    /// A holding has so many bytes now. One without any is left out.
    pub fn set(&mut self, holding: u32, bytes: u64) {
        if self.places.len() <= holding as usize {
            self.places.resize(holding as usize + 1, NONE);
        }
        let mut place = self.places[holding as usize] as usize;
        if place >= self.heap.len() {
            if bytes == 0 {
                return;
            }
            place = self.heap.len();
            self.heap.push((bytes, holding));
        } else if bytes == 0 {
            self.places[holding as usize] = NONE;
            let moved = self.heap.pop();
            match moved {
                Some(moved) if moved.1 != holding => self.heap[place] = moved,
                _ => return,
            }
        } else {
            self.heap[place].0 = bytes;
        }
        self.settle(place);
    }

    /// Moves what is at `place` up or down to where it belongs.
    fn settle(&mut self, mut place: usize) {
        let item = self.heap[place];
        while place > 0 && self.heap[(place - 1) / 2].0 < item.0 {
            place = self.take_over(place, (place - 1) / 2);
        }
        loop {
            let (left, right) = (2 * place + 1, 2 * place + 2);
            let bytes = |child: usize| self.heap.get(child).map_or(0, |(bytes, _)| *bytes);
            let child = if bytes(right) > bytes(left) { right } else { left };
            if bytes(child) <= item.0 {
                break;
            }
            place = self.take_over(place, child);
        }
        self.heap[place] = item;
        self.places[item.1 as usize] = place as u32;
    }

    /// Fills `place` from another one, which is to be filled next.
    fn take_over(&mut self, place: usize, from: usize) -> usize {
        let item = self.heap[from];
        self.heap[place] = item;
        self.places[item.1 as usize] = place as u32;
        from
    }

    #[cfg(test)]
    pub fn check(&self) {
        for (place, (bytes, holding)) in self.heap.iter().enumerate() {
            assert!(*bytes > 0 && self.heap[place.saturating_sub(1) / 2].0 >= *bytes);
            assert_eq!(self.places[*holding as usize] as usize, place);
        }
        assert_eq!(self.places.iter().filter(|place| **place != NONE).count(), self.heap.len());
    }
}
