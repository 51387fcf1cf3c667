package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"net/http"
	"time"
)

const (
	demoImageSide   = 8  // pixels
	demoImageTokens = 64 // of the answer, for each image
	maxDemoImages   = 10
)

// demoImageRequest is what the demo model reads of a request for images. Members it does not name have no effect.
type demoImageRequest struct {
	Prompt string `json:"prompt"`
	N      *int   `json:"n"`
}

func readDemoImageRequest(body []byte) (*demoImageRequest, error) {
	req := new(demoImageRequest)
	if err := json.Unmarshal(body, req); err != nil {
		return nil, fmt.Errorf("the body is not a request for images in JSON: %w", err)
	}
	if req.Prompt == "" {
		return nil, errors.New("prompt is required")
	}
	if req.N != nil && (*req.N < 1 || *req.N > maxDemoImages) {
		return nil, fmt.Errorf("n must be from 1 to %d", maxDemoImages)
	}
	return req, nil
}

// answerImages answers with images of a single colour each, which depends on the prompt, in the form of gpt-image-1.
func answerImages(w http.ResponseWriter, body []byte) error {
	req, err := readDemoImageRequest(body)
	if err != nil {
		return writeDemoError(w, http.StatusBadRequest, err)
	}
	n := 1
	if req.N != nil {
		n = *req.N
	}
	images := make([]object, n)
	for i := range images {
		encoded, err := req.image(i)
		if err != nil {
			return err
		}
		images[i] = object{"b64_json": encoded}
	}
	prompt, made := len(words(req.Prompt)), n*demoImageTokens
	return writeDemoJSON(w, http.StatusOK, object{
		"created":       time.Now().Unix(),
		"data":          images,
		"output_format": "png",
		"usage":         object{"input_tokens": prompt, "output_tokens": made, "total_tokens": prompt + made},
	})
}

// image returns the i-th image as a PNG. JSON has it as Base64.
func (r *demoImageRequest) image(i int) ([]byte, error) {
	hash := sha256.Sum256(fmt.Appendf(nil, "%d %s", i, r.Prompt))
	bounds := image.Rect(0, 0, demoImageSide, demoImageSide)
	canvas := image.NewPaletted(bounds, color.Palette{color.RGBA{hash[0], hash[1], hash[2], 0xff}})
	var encoded bytes.Buffer
	if err := png.Encode(&encoded, canvas); err != nil {
		return nil, fmt.Errorf("encoding image: %w", err)
	}
	return encoded.Bytes(), nil
}
