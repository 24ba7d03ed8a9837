//! Whether a model is left alone for a while, because of how its calls ended lately.
//!
//! The rule: asked only for models with a fallback; without one it is the gateway who turns to another pod.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use spillway_core::resilience::breaker::Permit;
use spillway_core::resilience::{Breaker, BreakerSettings, Outcome};

use super::ModelError;

#[derive(Debug)]
pub struct ModelBreaker {
    began: Instant,
    breaker: Mutex<Breaker>,
}

/// A call that may be made; without a word about its end it was cancelled.
pub struct Trial<'a> {
    breaker: &'a ModelBreaker,
    permit: Option<Permit>,
}

impl ModelBreaker {
    pub fn new(settings: BreakerSettings) -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), breaker: Mutex::new(Breaker::new(settings)) })
    }

    /// `None`: the model is left alone.
    pub fn try_call(&self) -> Option<Trial<'_>> {
        let permit = self.breaker.lock().permit(self.began.elapsed()).ok()?;
        Some(Trial { breaker: self, permit: Some(permit) })
    }
}

impl Trial<'_> {
    /// `patient`: the model had the time that it should need.
    pub fn ended<T>(mut self, result: &Result<T, ModelError>, patient: bool) {
        self.record(match result {
            Ok(_) => Outcome::Success,
            Err(ModelError::Unavailable(_) | ModelError::Failed(_) | ModelError::BadAnswer(_)) => Outcome::Failure,
            Err(ModelError::Refused(_)) => Outcome::Overload,
            Err(ModelError::Rejected(_)) => Outcome::ClientError,
            Err(ModelError::DeadlineExceeded) if patient => Outcome::Timeout,
            // A caller in a hurry says nothing about the model.
            Err(ModelError::DeadlineExceeded) => Outcome::Cancelled,
        });
    }

    fn record(&mut self, outcome: Outcome) {
        if let Some(permit) = self.permit.take() {
            self.breaker.breaker.lock().record(permit, outcome, self.breaker.began.elapsed());
        }
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.record(Outcome::Cancelled);
    }
}

/// Whether a call with so much time says something about a model that may take `deadline`.
pub fn is_patient(time: Duration, deadline: Duration) -> bool {
    time >= deadline / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker() -> Arc<ModelBreaker> {
        ModelBreaker::new(BreakerSettings { minimum: 4, ..BreakerSettings::default() })
    }

    #[test]
    fn a_model_that_hangs_is_left_alone_and_callers_in_a_hurry_do_not_make_it_so() {
        for (patient, alone) in [(true, true), (false, false)] {
            let breaker = breaker();
            for _ in 0..8 {
                let Some(trial) = breaker.try_call() else { break };
                trial.ended::<()>(&Err(ModelError::DeadlineExceeded), patient);
            }
            assert_eq!(breaker.try_call().is_none(), alone, "{patient}");
        }
        let ms = Duration::from_millis;
        assert!(is_patient(ms(100), ms(200)) && !is_patient(ms(99), ms(200)));
    }

    #[test]
    fn what_is_not_the_models_fault_does_not_count() {
        let breaker = breaker();
        for _ in 0..50 {
            breaker.try_call().unwrap().ended::<()>(&Err(ModelError::Rejected(String::new())), true);
            breaker.try_call().unwrap().ended::<()>(&Err(ModelError::Refused(String::new())), true);
            drop(breaker.try_call().unwrap());
        }
        breaker.try_call().unwrap().ended(&Ok(()), true);
    }
}
