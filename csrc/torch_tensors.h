// Reads where PyTorch's tensors lie through its stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), without
// linking against it: Python looks the functions up in the libtorch that is loaded.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace harmonica {

// The functions, by their names there without aoti_torch_. Each returns 0, or another number for an error.
struct TorchFunctions {
    int32_t (*get_data_ptr)(void* handle, void** address);
    int32_t (*get_dtype)(void* handle, int32_t* dtype);
    int32_t (*delete_tensor_object)(void* handle);
};

// Handles of tensors, which it owns. They follow a tensor that is given other memory (`tensor.data = ...`), and keep
// no memory alive that the tensor has left. While they live, swap_tensors refuses the tensors.
class TensorHandles {
public:
    struct Place {
        void* address;
        int64_t dtype;
    };

    TensorHandles(const TorchFunctions& functions, std::vector<void*> handles)
        : functions_(functions), handles_(std::move(handles)) {}
    TensorHandles(const TensorHandles&) = delete;
    TensorHandles& operator=(const TensorHandles&) = delete;
    ~TensorHandles() {
        for (void* handle : handles_) functions_.delete_tensor_object(handle);
    }

    std::vector<Place> places() const {
        std::vector<Place> found(handles_.size());
        for (size_t i = 0; i < found.size(); i++) {
            int32_t dtype;
            if (functions_.get_data_ptr(handles_[i], &found[i].address) || functions_.get_dtype(handles_[i], &dtype))
                throw std::runtime_error("tensor " + std::to_string(i) + " has no memory that a graph could read");
            found[i].dtype = dtype;
        }
        return found;
    }

private:
    TorchFunctions functions_;
    std::vector<void*> handles_;
};

}  // namespace harmonica
